"""A task for many sessions in several processes, and one line where Ctrl-C stops it."""
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from glob import escape, glob
from multiprocessing import active_children

from tqdm import tqdm

# ---------------------------------------------------------------- in a worker process

def begin(start, settings):
    """The start of a worker: start(settings). While it waits, Ctrl-C ends it without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    start(settings)

def work(task, item):
    """task(item); Ctrl-C lets it clear up what it has begun, such as a command, and ends the worker."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return task(item)
    except KeyboardInterrupt:
        os._exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

# ---------------------------------------------------------------- in the process that has them

def run_in_workers(task, items, count, start, settings):
    """[task(item)] of all items, in whatever order.

    count: of processes, -1 for one per core; one is this process itself. Others begin with start(settings).
    KeyboardInterrupt has their numbers as its arguments.
    """
    bar = {'total': len(items), 'desc': 'sessions', 'mininterval': 1}
    if count == 1: return list(tqdm(map(task, items), **bar))
    os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')  # one thread for each worker
    count = os.cpu_count() if count < 1 else count
    with ProcessPoolExecutor(count, initializer=begin, initargs=(start, settings)) as pool:
        futures = [pool.submit(work, task, item) for item in items]
        try:
            return [future.result() for future in tqdm(as_completed(futures), **bar)]
        except BrokenProcessPool:
            raise SystemExit('a worker process was killed, most likely for want of memory: lower --workers '
                             'and start again; what is written stays')
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*end_workers()) from None
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, what has not begun never will

def end_workers(patience_s=2):
    """End the workers, after a while that Ctrl-C leaves them to clear up; returns their numbers."""
    processes, end = active_children(), time.monotonic() + patience_s
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    for process in processes:
        process.terminate()
        process.join()
    return [process.pid for process in processes]

def stop(folder, numbers=()):
    """Remove files that this process, and others by their numbers, left half written; one line, exit 130."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (os.getpid(), *numbers):
        for name in (f'.part{number}_*', f'*.{number}.part', f'.facts/*.{number}.part'):
            for path in glob(f'{escape(folder)}/{name}'):
                os.remove(path)
    print('stopped; what is written stays; start again with the same command', file=sys.stderr)
    sys.exit(130)
