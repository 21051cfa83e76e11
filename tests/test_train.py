"""train_vae.py as a user runs it: every config, resume, two processes, refusals; tiny networks, tiny data."""
import csv
import json
import os
import runpy
import signal
from glob import glob

import numpy as np
import pytest
import torch

import judge.validate
import optim
from common import load_checkpoint, save_checkpoint
from conftest import ROOT, TINY, curves, play, play_two, progress, read_until, refuses, run, start
from data import Sessions
from judge import figures
from model import from_checkpoint

SHORT = ['--iters_3d=4', '--iters_2d=3', '--cross_start=1', '--cross_ramp=2', '--adv_start=1',
         '--eval_interval=100', '--eval_sessions=1']
CONVVAE = ['--kind=convvae', '--widths=8,8', '--latent_dim=3', '--w_ssim=0']
KL = [*CONVVAE, '--w_kl=1e-3', '--modalities=T1w', '--patch=24,24,24']

def train(data, out, *args):
    """The last checkpoint of a short training."""
    play('train_vae.py', *TINY, *SHORT, f'--data_dir={data}', f'--out_dir={out}', *args)
    return load_checkpoint(f'{out}/ckpt.pt')

def log_of(out):
    """Log lines without the figures of the clock."""
    steady = ('iter', 'train', 'val', 'lr')
    lines = []
    with open(f'{out}/log.jsonl') as f:
        for line in f:
            lines.append({k: v for k, v in json.loads(line).items() if k.startswith(steady)})
    return lines

def training_lines(out):
    return [line for line in log_of(out) if 'lr' in line]

def tensors(tree, path=''):
    """{path: tensor} of nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    found = {}
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        for key, value in tree.items():
            found |= tensors(value, f'{path}/{key}')
    return found

def assert_same_tensors(a, b):
    """Every tensor of two checkpoints has the same bits: weights, averages, codebook, optimiser."""
    a = tensors(a)
    b = tensors(b)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []

def assert_same_run(a, b, out_a, out_b):
    """Checkpoints and logs of two runs agree to the last bit."""
    assert_same_tensors(a, b)
    assert log_of(out_a) == log_of(out_b)

def changed_parts(before, after):
    """The modules some of whose weights differ."""
    return {key.split('.')[0] for key, value in before.items() if not torch.equal(value, after[key])}

# ---------------------------------------------------------------- configs and checkpoints

CONFIGS = [os.path.basename(path) for path in sorted(glob(os.path.join(ROOT, 'config', '*.py')))]

def is_of_an_autoencoder(name):
    return not any(word in name for word in ('flow', 'gpt', 'data_'))

@pytest.mark.parametrize('config', list(filter(is_of_an_autoencoder, CONFIGS)))
def test_every_config_trains_saves_and_resumes(config, tiny_data, tmp_path):
    """Smoke: two steps on volumes and one on slices where there are phases, then a resume of one more."""
    settings = runpy.run_path(os.path.join(ROOT, 'config', config))
    args = [f'{ROOT}/config/{config}', *TINY, *SHORT, '--iters_3d=2', f'--data_dir={tiny_data}',
            f'--out_dir={tmp_path}/out']
    if 'FLAIR' in settings.get('modalities', ()):
        args.append('--modalities=T1w,T2w')
    if 'synthesise' in settings:
        args.append('--synthesise=0')  # these phantoms have no label maps
    if settings.get('kind') == 'convvae':
        levels = len(settings.get('widths', (0,) * 4))
        args += ['--widths=' + ','.join(['8'] * levels), '--perceptual=random', '--slice_fraction=0.05',
                 '--init_from=scratch']
        if settings.get('patch'):
            args.append('--patch=24,24,24')
        if settings.get('bottleneck') == 'vq':
            args.append(f"--latent_dim={settings.get('num_codebooks', 1)}")
    play('train_vae.py', *args, '--max_iters=3')
    assert 'resumed' in play('train_vae.py', *args, '--max_iters=4', '--init_from=resume')
    values = [value for line in log_of(f'{tmp_path}/out') for value in line.values()]
    assert len(values) > 10 and np.isfinite(values).all()

def test_checkpoint_holds_what_the_readme_says(tiny_data, tmp_path):
    checkpoint = train(tiny_data, tmp_path / 'out', '--max_iters=1')
    promised = {'model', 'ema', 'optimizer', 'model_args', 'config', 'iter_num', 'best_val', 'git_commit'}
    assert promised <= checkpoint.keys()
    written = set(os.listdir(tmp_path / 'out')) - {'curves.png', 'progress.png'}  # with matplotlib
    assert written == {'best.pt', 'ckpt.pt', 'config.py', 'log.csv', 'log.jsonl'}

def test_the_written_config_repeats_the_run(tiny_data, tmp_path):
    first = train(tiny_data, tmp_path / 'out', '--max_iters=1')
    play('train_vae.py', f'{tmp_path}/out/config.py', f'--out_dir={tmp_path}/again')
    assert_same_tensors(first, load_checkpoint(tmp_path / 'again' / 'ckpt.pt'))

def test_best_is_of_the_last_phase(tiny_data, tmp_path):
    """Volumes are coded worse after the slices; the best of both phases would hide that."""
    train(tiny_data, tmp_path / 'out', '--eval_interval=1', '--ema_decay=0', '--lr=1e-2')  # unsteady
    best = load_checkpoint(tmp_path / 'out' / 'best.pt')
    assert best['iter_num'] > 4
    validations = [line for line in log_of(tmp_path / 'out') if 'val/psnr_db' in line and line['iter'] > 4]
    assert best['best_val'] == max(line['val/psnr_db'] for line in validations)

def test_a_convvae_has_no_phase_of_slices(tiny_data, tmp_path):
    """Its best.pt is the best of the whole run, also beyond the 100,000 steps of iters_3d's default."""
    args = ['--kind=convvae', '--latent_dim=3', '--w_ssim=0', '--iters=4', '--eval_interval=1', '--lr=1e-2']
    train(tiny_data, tmp_path / 'out', *args, '--iters_3d=2', '--ema_decay=0')
    assert not (tmp_path / 'out' / 'ckpt_3d.pt').exists()
    scores = [line['val/psnr_db'] for line in log_of(tmp_path / 'out') if 'val/psnr_db' in line]
    assert len(scores) == 4
    assert load_checkpoint(tmp_path / 'out' / 'best.pt')['best_val'] == max(scores)

def test_use_of_the_codes_is_that_of_clean_validation_tokens(tiny_data, tmp_path):
    model = from_checkpoint(train(tiny_data, tmp_path / 'out', '--iters_2d=0', '--eval_sessions=-1'))
    val_set = Sessions(tiny_data, ('T1w', 'T2w'), 'val')
    with torch.no_grad():
        tokens = [model.tokens(torch.tensor(val_set.volume(i, m))[None, None]) for i, m in val_set.scans]
    line = log_of(tmp_path / 'out')[-1]
    assert line['val/codes_used'] == len(torch.cat(tokens).unique())
    assert line['val/codes_used_brain'] <= line['val/codes_used']

def test_a_collapsed_codebook_is_said_to_be_that(tiny_data, tmp_path):
    checkpoint = train(tiny_data, tmp_path / 'start', '--max_iters=1', '--ema_decay=0')
    weights = checkpoint['model']
    weights['quantizer.codebook'][1:] += 1000  # out of reach, and not dead
    weights['quantizer.embed_sum'] = weights['quantizer.codebook'].clone()
    weights['quantizer.cluster_size'].fill_(1.0)
    save_checkpoint(tmp_path / 'start' / 'ckpt.pt', checkpoint)
    printed = play('train_vae.py', *TINY, *SHORT, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/out',
                   f'--init_from={tmp_path}/start/ckpt.pt', '--max_iters=1', '--ema_decay=0')
    assert 'only 1 of 16 codes are in use: the codebook has collapsed' in printed

def test_averaged_weights_are_what_from_checkpoint_gives(tiny_data, tmp_path):
    checkpoint = train(tiny_data, tmp_path / 'out', '--max_iters=2')
    for average, name in ((True, 'ema'), (False, 'model')):
        weights = from_checkpoint(checkpoint, average=average).state_dict()
        assert_same_tensors(weights, checkpoint[name])
    assert {'encoder', 'decoder'} <= changed_parts(checkpoint['ema'], checkpoint['model'])
    assert torch.equal(checkpoint['ema']['quantizer.codebook'], checkpoint['model']['quantizer.codebook'])

def test_commitment_of_slices_counts_when_it_is_asked_for(tiny_data, tmp_path):
    args = ['--iters_3d=1', '--iters_2d=2', '--ema_decay=0', '--w_cross=0', '--w_adv=0']
    without = train(tiny_data, tmp_path / 'without', *args)
    with_it = train(tiny_data, tmp_path / 'with', *args, '--w_commit_2d=1')
    assert 'encoder' in changed_parts(without['model'], with_it['model'])

def test_the_end_says_what_a_probe_reads_from_the_anatomy(tiny_data, tmp_path):
    printed = play('train_vae.py', *TINY, *SHORT, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/out',
                   '--max_iters=1', '--eval_sessions=-1')
    assert 'T1w or T2w: a fresh linear probe' in printed and 'of 4 validation scans of 2 subjects' in printed

def test_interleaved_training_logs_its_slices_apart(tiny_data, tmp_path):
    checkpoint = train(tiny_data, tmp_path / 'out', '--joint=interleaved', '--p_2d=1.0')
    assert 'train/recon_2d' in log_of(tmp_path / 'out')[0] and checkpoint['iter_num'] == 4

def test_the_control_without_a_codebook_trains_and_comes_back(tiny_data, tmp_path):
    checkpoint = train(tiny_data, tmp_path / 'a', '--quantizer=fsq')
    assert 'quantizer.codebook' not in checkpoint['model']
    model = from_checkpoint(checkpoint)
    tokens = model.tokens(torch.rand(1, 1, 32, 48, 32))
    assert model.from_tokens(tokens, 'T2w').shape == (1, 1, 32, 48, 32)
    assert 1 <= log_of(tmp_path / 'a')[0]['train/perplexity'] <= 16

def test_ablation_switches_leave_no_classifier_behind(tiny_data, tmp_path):
    assert train(tiny_data, tmp_path / 'a', '--w_adv=0.0', '--max_iters=1')['classifier'] is None

# ---------------------------------------------------------------- resume, accumulation, two processes

def test_resume_gives_the_same_bits_in_both_phases_and_across(tiny_data, tmp_path):
    """7 steps straight against 2 + 3 + 2 with the change from volumes to slices inside."""
    whole = train(tiny_data, tmp_path / 'a')
    train(tiny_data, tmp_path / 'b', '--max_iters=2')
    train(tiny_data, tmp_path / 'b', '--max_iters=5', '--init_from=resume')
    parts = train(tiny_data, tmp_path / 'b', '--init_from=resume')
    assert_same_tensors(whole, parts)
    assert training_lines(tmp_path / 'a') == training_lines(tmp_path / 'b')

def test_stopping_adds_a_validation_and_changes_no_other(tiny_data, tmp_path):
    train(tiny_data, tmp_path / 'a')
    train(tiny_data, tmp_path / 'b', '--max_iters=2')
    train(tiny_data, tmp_path / 'b', '--init_from=resume')
    straight = [line for line in log_of(tmp_path / 'a') if 'lr' not in line]
    stopped = [line for line in log_of(tmp_path / 'b') if 'lr' not in line]
    assert straight and [line for line in stopped if line['iter'] != 2] == straight

def test_a_signal_in_the_step_of_a_validation_does_not_lose_it(tiny_data, tmp_path, monkeypatch):
    args = [*TINY, *SHORT, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/out', '--eval_interval=2']
    taken = []
    def at_the_second(optimizers, parameters, rate, grad_clip):
        taken.append(rate)
        if len(taken) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(optimizers, parameters, rate, grad_clip)
    step = optim.take_step
    monkeypatch.setattr(optim, 'take_step', at_the_second)
    stopped = run('train_vae.py', *args, '--max_iters=4')
    assert stopped.returncode == 128 + signal.SIGTERM
    play('train_vae.py', *args, '--max_iters=4', '--init_from=resume')
    assert [record['iter'] for record in log_of(tmp_path / 'out') if 'val/psnr_db' in record] == [2, 4]

def test_a_validation_that_was_killed_comes_first_after_a_resume(tiny_data, tmp_path, monkeypatch):
    """A cluster sends SIGTERM, and soon SIGKILL; here at the end of the volumes."""
    whole = train(tiny_data, tmp_path / 'a')
    args = [*TINY, *SHORT, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/b']
    taken = []
    def terminated_at_the_fourth(optimizers, parameters, rate, grad_clip):
        taken.append(rate)
        if len(taken) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(optimizers, parameters, rate, grad_clip)
    def killed(*args):
        raise SystemExit('killed')
    step = optim.take_step
    with monkeypatch.context() as patches:
        patches.setattr(optim, 'take_step', terminated_at_the_fourth)
        patches.setattr(judge.validate, 'validate', killed)
        assert 'killed' in run('train_vae.py', *args).stderr
    assert not (tmp_path / 'b' / 'ckpt_3d.pt').exists()
    parts = train(tiny_data, tmp_path / 'b', '--init_from=resume')
    assert_same_tensors(whole, parts)
    assert parts['best_val'] == whole['best_val'] and (tmp_path / 'b' / 'ckpt_3d.pt').exists()
    assert log_of(tmp_path / 'b') == log_of(tmp_path / 'a')

@pytest.mark.parametrize('tuning', [False, True])
def test_resume_with_discriminators_gives_the_same_bits(tuning, tiny_data, tmp_path):
    """As the whole autoencoder is trained, and as its decoder is fine-tuned."""
    args = [*KL, '--w_discriminator=0.1', '--discriminator_start=1', '--w_sid=1.0', '--w_perc=0.1',
            '--perceptual=random', '--augment=True']
    if tuning:
        train(tiny_data, tmp_path / 'first', *args, '--max_iters=1')
        args += ['--freeze_encoder=True', '--w_sid=0.0', f'--init_from={tmp_path}/first/ckpt.pt']
    whole = train(tiny_data, tmp_path / 'a', *args, '--max_iters=4')
    train(tiny_data, tmp_path / 'b', *args, '--max_iters=2')
    parts = train(tiny_data, tmp_path / 'b', *args, '--max_iters=4', '--init_from=resume')
    assert_same_tensors(whole, parts)

def test_micro_steps_are_one_batch(tiny_data, tmp_path):
    """Weights, codebook and modality means, where micro-batches weigh unequally: some lack a modality."""
    args = ['--joint=none', '--revive=0.0', '--code_decay=0.9', '--cross_start=-9', '--ema_decay=0',
            '--lr=1e-5']
    train(tiny_data, tmp_path / 'start', *args, '--batch_size=8', '--max_iters=1')  # fills the codebook
    args += [f'--init_from={tmp_path}/start/ckpt.pt', '--max_iters=3']
    one = train(tiny_data, tmp_path / 'one', *args, '--batch_size=4')['model']
    two = train(tiny_data, tmp_path / 'two', *args, '--batch_size=2', '--grad_accum=2')['model']
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5, msg=key)
    for a, b in zip(training_lines(tmp_path / 'one'), training_lines(tmp_path / 'two')):
        assert a == pytest.approx(b, rel=1e-3)

def test_processes_agree_on_the_terms_where_one_has_no_pair(tiny_data, tmp_path):
    """Half of the sessions lack T2w: at batch size 1 one process often has a pair and the other none."""
    table = tiny_data / 'subjects.tsv'
    for k in range(0, 8, 2):
        table.write_text(table.read_text().replace(f'sub-0{k}_ses-01_T2w.npy', ''))
    args = ['--joint=none', '--cross_start=-9', '--iters_3d=6', '--w_align=0.1']
    train(tiny_data, tmp_path / 'one', *args, '--batch_size=2')
    play_two('train_vae.py', *TINY, *SHORT, *args, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/two',
             '--batch_size=1', port=29515)
    for a, b in zip(training_lines(tmp_path / 'one'), training_lines(tmp_path / 'two')):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)

@pytest.mark.parametrize('kind', [
    [],
    [*CONVVAE, '--w_kl=1e-3', '--w_sid=1', '--gather=True', '--w_discriminator=0.1', '--w_perc=0.1',
     '--perceptual=random', '--patch=32,32,32', '--iters=4', '--augment=True'],
], ids=['neuroquant', 'convvae'])
def test_two_processes_equal_one_on_the_joined_batch(kind, tiny_data, tmp_path):
    """All losses on, sessions that lack a modality, an uneven validation set, volumes then slices."""
    args = [*kind, '--eval_sessions=-1']
    one = train(tiny_data, tmp_path / 'one', *args, '--batch_size_2d=16')
    play_two('train_vae.py', *TINY, *SHORT, *args, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/two',
             '--batch_size=1', '--batch_size_2d=8', port=29512)
    two = load_checkpoint(tmp_path / 'two' / 'ckpt.pt')
    # instance norm over a handful of voxels, deep in a discriminator, amplifies the last bits
    amplified = ('train/generator', 'train/discriminator', 'train/grad_norm') if kind else ()
    for a, b in zip(log_of(tmp_path / 'one'), log_of(tmp_path / 'two')):
        assert a.keys() == b.keys()
        for key in a:
            tolerance = 2e-2 if key in amplified else 1e-3
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=1e-4), key
    # Adam turns the last bits of tiny gradients into steps of size lr, 1e-4: few weights may differ
    differences = [(two['model'][key] - value).abs().flatten() for key, value in one['model'].items()]
    differences = torch.cat(differences)
    assert differences.max() < 1e-3 and differences.mean() < 1e-5

def test_checkpointing_of_convvae_changes_memory_and_nothing_else(tiny_data, tmp_path):
    args = ['--kind=convvae', '--widths=8,8', '--w_ssim=0', '--max_iters=2']
    plain = train(tiny_data, tmp_path / 'plain', *args)['model']
    recomputed = train(tiny_data, tmp_path / 'recomputed', *args, '--checkpointing=True')['model']
    for key, value in plain.items():
        torch.testing.assert_close(recomputed[key], value, rtol=1e-4, atol=1e-5)

# ---------------------------------------------------------------- discriminators, decoder fine-tuning

def test_discriminators_learn_nothing_from_the_generators_step(tiny_data, tmp_path):
    """A leak would scale with w_discriminator."""
    args = [*KL, '--discriminator_dims=3,2', '--max_iters=1', '--ema_decay=0']
    weak = train(tiny_data, tmp_path / 'weak', *args, '--w_discriminator=0.5')
    strong = train(tiny_data, tmp_path / 'strong', *args, '--w_discriminator=5.0')
    assert_same_tensors(weak['discriminators'], strong['discriminators'])
    assert changed_parts(weak['model'], strong['model'])

def test_the_generator_learns_nothing_from_the_discriminators_step(tiny_data, tmp_path):
    """A weight of 1e-30 is too small for a float to notice, but the discriminators learn."""
    args = [*KL, '--discriminator_dims=3,2', '--max_iters=1', '--ema_decay=0']
    without = train(tiny_data, tmp_path / 'without', *args, '--w_discriminator=0.0')
    tiny = train(tiny_data, tmp_path / 'tiny', *args, '--w_discriminator=1e-30')
    assert_same_tensors(without['model'], tiny['model'])

TUNING = [*KL, '--freeze_encoder=True', '--w_discriminator=1.0', '--w_perc=60.0', '--perceptual=random',
          '--max_iters=3', '--w_kl=0']

def test_decoder_fine_tuning_leaves_the_encoder_bit_for_bit(tiny_data, tmp_path):
    before = train(tiny_data, tmp_path / 'a', *KL, '--max_iters=2')
    after = train(tiny_data, tmp_path / 'b', *TUNING, f'--init_from={tmp_path}/a/ckpt.pt')
    for name in ('model', 'ema'):
        assert changed_parts(before['ema'], after[name]) == {'decoder', 'post'}
    assert 'train/perc_random' in log_of(tmp_path / 'b')[0]

def test_decoder_fine_tuning_leaves_the_codebook_too(tiny_data, tmp_path):
    args = [*CONVVAE, '--bottleneck=vq', '--modalities=T1w', '--max_iters=2']
    before = train(tiny_data, tmp_path / 'a', *args)
    args += ['--freeze_encoder=True', f'--init_from={tmp_path}/a/ckpt.pt']
    after = train(tiny_data, tmp_path / 'b', *args)
    assert changed_parts(before['ema'], after['model']) == {'decoder', 'post'}

def test_decoder_fine_tuning_starts_with_fresh_discriminators(tiny_data, tmp_path):
    before = train(tiny_data, tmp_path / 'a', *KL, '--max_iters=2', '--w_discriminator=0.1')
    args = [*TUNING, f'--init_from={tmp_path}/a/ckpt.pt', '--discriminator_start=5']
    fresh = train(tiny_data, tmp_path / 'b', *args)['discriminators']
    before = tensors(before['discriminators'])
    for key, value in tensors(fresh).items():
        assert value.ndim == 1 or not torch.equal(value, before[key]), key

@pytest.mark.parametrize('args, term', [
    (['--w_sid=1'], 'sid'),
    (['--w_cov=1'], 'cov'),
    (['--w_var=1'], 'var'),
    (['--w_ssim=1'], 'ssim'),
    (['--kl_reduction=sum'], 'kl'),
    (['--bottleneck=vq', '--num_codebooks=2', '--w_kl=0'], 'commit'),
    (['--w_discriminator=1', '--discriminator_dims=2,', '--discriminator_form=hinge'], 'discriminator')])
def test_every_term_is_logged_and_finite(args, term, tiny_data, tmp_path):
    train(tiny_data, tmp_path / 'a', *KL, *args, '--max_iters=2')
    values = [line[f'train/{term}'] for line in training_lines(tmp_path / 'a')]
    assert len(values) == 2 and np.isfinite(values).all()

# ---------------------------------------------------------------- does it learn

@pytest.mark.slow
def test_a_base_model_overfits_one_pair(tiny_data, tmp_path):
    """With attention, FiLM and the auxiliary losses off, one session is learned to at least 30 dB."""
    table = tiny_data / 'subjects.tsv'
    head, first = table.read_text().splitlines()[:2]
    again = first.replace('sub-00', 'sub-x').replace('sub-x_', 'sub-00_').replace('train', 'val')
    table.write_text('\n'.join([head, first, again]))
    train(tiny_data, tmp_path / 'a', f'{ROOT}/config/ablation_base.py', f'--out_dir={tmp_path}/a',
          '--widths=16,32,48,64', '--batch_size=1', '--iters_3d=2000', '--num_codes=64', '--anat_dim=32',
          '--joint=none', '--recon=l2', '--w_ssim=0', '--w_commit=0.025', '--lr=2e-3',
          '--lr_decay_iters=2000', '--ema_decay=0.9', '--log_interval=50')
    assert log_of(tmp_path / 'a')[-1]['val/psnr_db'] > 30

@pytest.mark.slow
def test_swapped_film_changes_the_contrast_and_not_the_anatomy(tmp_path):
    """One set of codes under two FiLMs after 300 steps: white matter darkens, the brain stays."""
    play('train_vae.py', f'{ROOT}/config/demo.py', '--max_iters=300', f'--data_dir={tmp_path}/data',
         f'--out_dir={tmp_path}/out', '--cross_start=100')
    model = from_checkpoint(load_checkpoint(tmp_path / 'out' / 'ckpt.pt'))
    test = Sessions(tmp_path / 'data', ('T1w', 'T2w'), 'test')
    for i in range(min(test.n, 5)):
        labels = np.load(tmp_path / 'data' / test.rows[i]['dseg'])
        white = np.isin(labels, (2, 41))
        grey_and_fluid = np.isin(labels, (3, 42, 24))
        with torch.no_grad():
            tokens = model.tokens(torch.tensor(test.volume(i, 0))[None, None])
            t1, t2 = (model.from_tokens(tokens, m)[0, 0].numpy() for m in (0, 1))
        assert t1[white].mean() > t1[grey_and_fluid].mean() + 0.05
        assert t2[white].mean() < t2[grey_and_fluid].mean() - 0.05
        a = t1 > 0.15
        b = t2 > 0.15
        # one threshold cuts the fluid's rim, dark in one of them
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.85

# ---------------------------------------------------------------- refusals and signals

@pytest.mark.parametrize('args, words', [
    (['--lrr=1'], ["unknown key 'lrr'", "'lr'"]),
    (['--lr=fast'], ['lr must be float']),
    (['--joint=both'], ['sequential or interleaved or none']),
    (['--film=False'], ['w_cross', 'film=True']),
    (['--data_dir=/nowhere/at/all'], ['/nowhere/at/all', 'prepare.py']),
    (['--modalities=T1w,FLAIR'], ['FLAIR', 'it has T1w, T2w']),
    (['--widths=16,16,16'], ['widths', 'four']),
    (['--patch=24,48,32'], ['24', 'multiple of 16']),
    (['--init_from=resume'], ['ckpt.pt', 'no such checkpoint']),
    (['--init_from=pytest.ini'], ['pytest.ini', 'not a readable checkpoint']),
    (['--kind=gan'], ['neuroquant or convvae']),
    (['--recon=l3'], ['l1 or l2']),
    (['--quantizer=fsq', '--num_codes=24'], ['fsq', 'power of 2']),
    (['--freeze_encoder=True'], ['convvae']),
    (['--w_discriminator=1'], ['w_discriminator', 'convvae']),
    (['--kind=convvae', '--w_perc=1'], ['squeezenet1_1', 'no path given']),
    (['--kind=convvae', '--bottleneck=vq', '--num_codebooks=3', '--codebooks=split'],
     ['4 channels', '3 codebooks']),
    (['--kind=convvae', '--bottleneck=vq', '--w_kl=1'], ['w_kl', "bottleneck='kl'"]),
    (['--kind=convvae', '--w_perc=1', '--perceptual=random', '--patch=16,16,16'],
     ['--patch', '2D perceptual network', '16x16x16']),
    (['--kind=convvae', '--w_discriminator=1', '--patch=16,16,16'], ['--patch', '3D PatchGAN']),
    (['--kind=convvae', '--dims=2', '--synthesise=0.5'], ['--synthesise', 'dims=2']),
    (['--kind=convvae', '--dims=2', '--augment=True'], ['augment', 'dims=2']),
    (['--kind=convvae', '--dims=2', '--patch=16,16,16'], ['patch', 'dims=2']),
    (['--out_dir=/proc/nowhere'], ['/proc/nowhere', 'cannot write'])])
def test_bad_settings_end_with_one_line(args, words, tiny_data, tmp_path):
    line = refuses('train_vae.py', *TINY, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/out', *args)
    assert all(word in line for word in words), line

def test_checkpoint_of_another_model_is_refused_with_the_difference(tiny_data, tmp_path):
    train(tiny_data, tmp_path / 'out', '--max_iters=1')
    args = [*TINY, *SHORT, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/out', '--init_from=resume']
    line = refuses('train_vae.py', *args, '--num_codes=32')
    assert 'another model' in line and 'num_codes 16 there, 32 here' in line

def test_a_changed_dataset_is_refused_on_resume_and_not_for_a_new_run(tiny_data, tmp_path):
    train(tiny_data, tmp_path / 'out', '--max_iters=1')
    table = tiny_data / 'subjects.tsv'
    table.write_text(table.read_text().replace('sub-05\tses-01\ttrain', 'sub-05\tses-01\tval'))
    args = [*TINY, *SHORT, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/out', '--max_iters=2']
    assert 'is not what' in refuses('train_vae.py', *args, '--init_from=resume')
    play('train_vae.py', *args, f'--init_from={tmp_path}/out/ckpt.pt', '--overwrite=True')

def test_sigterm_finishes_the_step_saves_and_says_so(tiny_data, tmp_path):
    process = start('train_vae.py', *TINY, '--iters_3d=10000', f'--data_dir={tiny_data}',
                    f'--out_dir={tmp_path}/out')
    read_until(process, 'iter 3')
    process.terminate()
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and 'resume' in printed and errors == ''
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter_num'] >= 3

# ---------------------------------------------------------------- what a run shows, and refuses

def test_a_validation_leaves_curves_a_picture_and_a_table(tiny_data, tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    monkeypatch.setattr(figures, 'curves', curves)
    monkeypatch.setattr(figures, 'progress', progress)
    out = tmp_path / 'out'
    printed = play('train_vae.py', *TINY, *SHORT, f'--data_dir={tiny_data}', f'--out_dir={out}')
    assert 'iter 3/7: ' in printed and ' left' in printed
    for name in ('curves.png', 'progress.png'):
        assert (out / name).stat().st_size > 5000
    with open(out / 'log.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    with open(out / 'log.jsonl') as f:
        records = [json.loads(line) for line in f]
    assert len(rows) == len(records)
    for row, record in zip(rows, records):
        assert {key: float(value) for key, value in row.items() if value} == pytest.approx(record)

def test_modalities_that_are_there_and_not_used_are_named_once(tiny_data, tmp_path):
    args = [*TINY, *SHORT, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/out', '--max_iters=1',
            '--w_cross=0']
    assert 'not used: ' not in play('train_vae.py', *args)
    printed = play('train_vae.py', *args, '--modalities=T1w', '--overwrite=True')
    assert printed.count('not used: T2w') == 1

@pytest.mark.parametrize('flag, message', [
    ('--batch_size=0', 'at least 1'),
    ('--dtype=fp16', 'bfloat16 or float32'),
    ('--device=mps', 'cuda or cpu')])
def test_settings_that_cannot_be_end_with_one_line(tiny_data, tmp_path, flag, message):
    args = [*TINY, *SHORT, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}', flag]
    assert message in refuses('train_vae.py', *args)

def test_muon_resumes_to_the_same_bits(tiny_data, tmp_path):
    args = ('--muon=True', '--iters_2d=0')
    whole = train(tiny_data, tmp_path / 'a', *args)
    train(tiny_data, tmp_path / 'b', *args, '--max_iters=2')
    parts = train(tiny_data, tmp_path / 'b', *args, '--init_from=resume')
    assert whole['muon']['state']
    assert_same_tensors(whole['muon'], parts['muon'])
    assert_same_tensors(whole['model'], parts['model'])
