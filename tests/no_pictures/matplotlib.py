raise ImportError('processes that tests start draw nothing: it would take longer than their trainings')
