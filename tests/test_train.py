"""train_vae.py as a user runs it: every config, resume, two processes, refusals. Tiny networks on tiny data."""
import glob
import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, TINY, play, refuses
from common import load_checkpoint
from data import Sessions
from model import from_checkpoint

SHORT = [
    '--iters_3d=4', '--iters_2d=3', '--cross_start=1', '--cross_ramp=2', '--adv_start=1',
    '--eval_interval=100', '--eval_sessions=1'
]

def train(data, out, *args):
    play('train_vae.py', *TINY, *SHORT, f'--data_dir={data}', f'--out_dir={out}', *args)
    return load_checkpoint(f'{out}/ckpt.pt')

def log_of(out):
    """Log lines without the figures of the clock."""
    lines = [json.loads(line) for line in open(f'{out}/log.jsonl')]
    return [{k: v for k, v in line.items() if k.startswith(('iter', 'train', 'val', 'lr'))} for line in lines]

def tensors(tree, path=''):
    if isinstance(tree, torch.Tensor): return {path: tree}
    items = (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    )
    return {k: v for key, value in items for k, v in tensors(value, f'{path}/{key}').items()}

def assert_same_run(a, b, out_a, out_b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []
    assert log_of(out_a) == log_of(out_b)

@pytest.mark.parametrize('config', sorted(os.path.basename(p) for p in glob.glob(os.path.join(ROOT, 'config', '*.py')) if 'flow' not in p and 'data_' not in p))
def test_every_config_trains_saves_and_resumes(config, tiny_data, tmp_path):
    """Smoke: two steps on volumes and one on slices where there are phases, then a resume of one more."""
    settings = runpy.run_path(os.path.join(ROOT, 'config', config))
    args = [
        f'{ROOT}/config/{config}',
        *TINY,
        *SHORT,
        '--iters_3d=2',
        f'--data_dir={tiny_data}',
        f'--out_dir={tmp_path}/out',
    ]
    if 'FLAIR' in settings.get('modalities', ()):
        args.append('--modalities=T1w,T2w')
    if settings.get('kind') == 'convvae':
        levels = len(settings.get('widths', (0,) * 4))
        args += [
            f'--widths={",".join(["8"] * levels)}',
            '--perceptual=random',
            '--slice_fraction=0.05',
            '--init_from=scratch',
        ]
        if settings.get('patch'):
            args += ['--patch=24,24,24']
        if settings.get('bottleneck') == 'vq':
            args += [f"--latent_dim={settings.get('num_codebooks', 1)}"]
    play('train_vae.py', *args, '--max_iters=3')
    printed = play('train_vae.py', *args, '--max_iters=4', '--init_from=resume')
    assert 'resumed' in printed
    values = [v for line in log_of(f'{tmp_path}/out') for v in line.values()]
    assert len(values) > 10 and np.isfinite(values).all()

def test_resume_gives_the_same_bits_in_both_phases_and_across(tiny_data, tmp_path):
    """7 steps straight against 2 + 3 + 2 with the change of phase inside: weights, averages, codebook, optimiser, classifier, log."""
    whole = train(tiny_data, tmp_path / 'a')
    train(tiny_data, tmp_path / 'b', '--max_iters=2')
    train(tiny_data, tmp_path / 'b', '--max_iters=5', '--init_from=resume')
    parts = train(tiny_data, tmp_path / 'b', '--init_from=resume')
    drop = {(line['iter'], k) for line in log_of(tmp_path / 'b') for k in line if k.startswith('val')} - \
           {(line['iter'], k) for line in log_of(tmp_path / 'a') for k in line if k.startswith('val')}
    assert {i for i, _ in drop} <= {2, 5}  # the stops validate; nothing else differs
    a, b = tensors(whole), tensors(parts)
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []
    train_lines = [[line for line in log_of(tmp_path / r) if 'lr' in line] for r in 'ab']
    assert train_lines[0] == train_lines[1]

def test_grad_accumulation_of_equal_parts_equals_one_batch(tiny_data, tmp_path):
    """Sessions with both modalities alone, since then micro-batches weigh the same; the codebook's EMA counts per micro-batch."""
    table = tiny_data / 'subjects.tsv'
    table.write_text('\n'.join(line for line in table.read_text().splitlines() if '\t\t' not in line))
    args = ['--iters_2d=0', '--code_decay=1.0', '--revive=0.0', '--iters_3d=1', '--w_cross=0.0']
    one = train(tiny_data, tmp_path / 'a', '--batch_size=4', *args)
    two = train(tiny_data, tmp_path / 'b', '--batch_size=2', '--grad_accum=2', *args)
    assert log_of(tmp_path / 'a')[0]['train/recon'] == pytest.approx(
        log_of(tmp_path / 'b')[0]['train/recon'], rel=0.02
    )
    assert one['iter_num'] == two['iter_num'] == 1

@pytest.mark.parametrize('kind', [[], ['--kind=convvae', '--widths=8,8', '--latent_dim=3', '--w_ssim=0', '--w_kl=1e-3', '--w_sid=1', '--gather=True', '--w_discriminator=0.1',
                                       '--w_perc=0.1', '--perceptual=random', '--patch=32,32,32', '--iters=4', '--augment=True']])
def test_two_processes_equal_one_on_the_joined_batch(kind, tiny_data, tmp_path):
    """Cross and adversarial losses on, sessions that lack a modality, an uneven validation set, volumes then slices; ConvVAE with GANs."""
    one = train(tiny_data, tmp_path / 'one', *kind, '--batch_size_2d=16', '--eval_sessions=-1')
    args = [
        *TINY,
        *SHORT,
        *kind,
        '--eval_sessions=-1',
        f'--data_dir={tiny_data}',
        f'--out_dir={tmp_path}/two',
        '--batch_size=1',
        '--batch_size_2d=8',
    ]
    done = subprocess.run(
        [
            sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=29512',
            'train_vae.py', *args
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr
    two = load_checkpoint(tmp_path / 'two' / 'ckpt.pt')
    for a, b in zip(log_of(tmp_path / 'one'), log_of(tmp_path / 'two')):
        assert a.keys() == b.keys()
        # instance norm over a handful of voxels, deep in a discriminator, amplifies the last bits
        for k in a:
            assert a[k] == pytest.approx(
                b[k],
                rel=2e-2 if kind and k.split('/')[-1] in ('gan', 'critic', 'grad_norm') else 1e-3,
                abs=1e-4,
            ), k
    # Adam turns the last bits of tiny gradients into steps of size lr, 1e-4: a few weights differ, on
    # average they must not
    assert max((two['model'][k] - v).abs().max().item() for k, v in one['model'].items()) < 1e-3
    differences = torch.cat([(two['model'][k] - v).flatten() for k, v in one['model'].items()]).abs()
    assert differences.mean() < 1e-5

def test_checkpoint_holds_what_the_readme_says(tiny_data, tmp_path):
    checkpoint = train(tiny_data, tmp_path / 'out', '--joint=interleaved', '--p_2d=1.0')
    assert {
        'model', 'ema', 'optimizer', 'model_args', 'config', 'iter_num', 'best_val', 'git_commit'
    } <= checkpoint.keys()
    assert 'train/recon_2d' in log_of(tmp_path / 'out')[0] and checkpoint['iter_num'] == 4
    assert sorted(os.listdir(tmp_path / 'out')) == ['best.pt', 'ckpt.pt', 'config.py', 'log.jsonl']
    play('train_vae.py', f'{tmp_path}/out/config.py', '--max_iters=1', f'--out_dir={tmp_path}/again')
    assert torch.equal(checkpoint['ema']['quantizer.codebook'], checkpoint['model']['quantizer.codebook'])
    averaged, last = (
        from_checkpoint(checkpoint, average=a).state_dict()['encoder.stem.weight'] for a in (True, False)
    )
    assert not torch.equal(averaged, last)

def test_the_control_without_a_codebook_trains_and_comes_back(tiny_data, tmp_path):
    checkpoint = train(tiny_data, tmp_path / 'a', '--quantizer=fsq')
    model = from_checkpoint(checkpoint)
    tokens = model.tokens(torch.rand(1, 1, 32, 48, 32))
    assert 'quantizer.codebook' not in checkpoint['model'] and model.from_tokens(tokens, 'T2w').shape == (
        1, 1, 32, 48, 32
    )
    assert 1 <= log_of(tmp_path / 'a')[0]['train/perplexity'] <= 16

def test_ablation_switches_leave_no_classifier_behind(tiny_data, tmp_path):
    assert train(tiny_data, tmp_path / 'a', '--w_adv=0.0', '--max_iters=1')['classifier'] is None

KL = [
    '--kind=convvae', '--widths=8,8', '--latent_dim=3', '--w_ssim=0', '--w_kl=1e-3', '--modalities=T1w',
    '--patch=24,24,24'
]

def test_discriminators_learn_nothing_from_the_generators_step_nor_it_from_theirs(tiny_data, tmp_path):
    args = [*KL, '--discriminator_dims=3,2', '--max_iters=1', '--ema_decay=0']
    weak, strong, none, tiny = (
        train(tiny_data, tmp_path / f'w{w}', *args, f'--w_discriminator={w}') for w in (0.5, 5.0, 0.0, 1e-30)
    )
    for k, v in weak['critics'].items():
        assert torch.equal(v, strong['critics'][k]), k  # a leak would scale with w_discriminator
    assert not all(torch.equal(v, strong['model'][k]) for k, v in weak['model'].items())
    for k, v in none['model'].items():
        assert torch.equal(v, tiny['model'][k]), k  # w_discriminator 1e-30 is too small for a float to notice

def test_decoder_fine_tuning_leaves_the_encoder_bit_for_bit(tiny_data, tmp_path):
    before = train(tiny_data, tmp_path / 'a', *KL, '--max_iters=2', '--w_discriminator=0.1')
    args = [
        *KL,
        '--freeze_encoder=True',
        '--w_discriminator=1.0',
        '--w_perc=60.0',
        '--perceptual=random',
        '--max_iters=3',
        '--w_kl=0',
        f'--init_from={tmp_path}/a/ckpt.pt',
    ]
    after = train(tiny_data, tmp_path / 'b', *args)
    for weights in (after['model'], after['ema']):
        changed = {k.split('.')[0] for k, v in before['ema'].items() if not torch.equal(v, weights[k])}
        assert changed == {'decoder', 'post'}
    # as they start, before any step
    fresh = train(tiny_data, tmp_path / 'c', *args, '--discriminator_start=5')['critics']
    assert not any(torch.equal(v, before['critics'][k]) for k, v in fresh.items() if v.ndim > 1)
    assert 'train/perc_random' in log_of(tmp_path / 'b')[0]

def test_decoder_fine_tuning_leaves_the_codebook_too(tiny_data, tmp_path):
    args = [
        '--kind=convvae', '--widths=8,8', '--latent_dim=3', '--bottleneck=vq', '--w_ssim=0',
        '--modalities=T1w', '--max_iters=2'
    ]
    before = train(tiny_data, tmp_path / 'a', *args)['ema']
    after = train(
        tiny_data, tmp_path / 'b', *args, '--freeze_encoder=True', f'--init_from={tmp_path}/a/ckpt.pt'
    )['model']
    assert {k.split('.')[0] for k, v in before.items() if not torch.equal(v, after[k])} == {'decoder', 'post'}

def test_checkpointing_of_convvae_changes_memory_and_nothing_else(tiny_data, tmp_path):
    args = ['--kind=convvae', '--widths=8,8', '--w_ssim=0', '--max_iters=2']
    plain, recomputed = (
        train(tiny_data, tmp_path / str(c), *args, f'--checkpointing={c}')['model'] for c in (False, True)
    )
    for k, v in plain.items():
        torch.testing.assert_close(recomputed[k], v, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('tuning', [False, True])
def test_resume_of_a_gan_run_gives_the_same_bits(tuning, tiny_data, tmp_path):
    """As the whole autoencoder is trained, and as its decoder is fine-tuned."""
    args = [
        *KL, '--w_discriminator=0.1', '--w_sid=1.0', '--w_perc=0.1', '--perceptual=random', '--augment=True',
        '--discriminator_start=1'
    ]
    if tuning:
        train(tiny_data, tmp_path / 'first', *args, '--max_iters=1')
        args += ['--freeze_encoder=True', '--w_sid=0.0', f'--init_from={tmp_path}/first/ckpt.pt']
    whole = train(tiny_data, tmp_path / 'a', *args, '--max_iters=4')
    train(tiny_data, tmp_path / 'b', *args, '--max_iters=2')
    parts = train(tiny_data, tmp_path / 'b', *args, '--max_iters=4', '--init_from=resume')
    a, b = tensors(whole), tensors(parts)
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []

@pytest.mark.parametrize('args, term', [(['--w_sid=1'], 'sid'), (['--w_cov=1'], 'cov'), (['--w_var=1'], 'var'), (['--bottleneck=vq', '--num_codebooks=2'], 'commit'),
                                        (['--w_ssim=1'], 'ssim'), (['--w_discriminator=1', '--discriminator_dims=2,', '--discriminator_form=hinge'], 'critic'), (['--kl_reduction=sum'], 'kl')])
def test_every_term_is_logged_and_finite(args, term, tiny_data, tmp_path):
    args = [a for a in KL if '--w_kl' not in a or '--bottleneck=vq' not in args] + args
    train(tiny_data, tmp_path / 'a', *args, '--max_iters=2')
    assert np.isfinite([line[f'train/{term}'] for line in log_of(tmp_path / 'a') if 'lr' in line]).all()

@pytest.mark.slow
def test_a_base_model_overfits_one_pair(tiny_data, tmp_path):
    """Checklist S3: with attention, FiLM and the auxiliary losses off, one session is learned to at least 30 dB."""
    table = tiny_data / 'subjects.tsv'
    lines = table.read_text().splitlines()
    table.write_text(
        '\n'.join([
            lines[0],
            lines[1],
            lines[1].replace('sub-00', 'sub-x').replace('sub-x_', 'sub-00_').replace('train', 'val'),
        ])
    )
    train(
        tiny_data,
        tmp_path / 'a',
        f'{ROOT}/config/ablation_base.py',
        '--widths=16,32,48,64',
        '--batch_size=1',
        '--iters_3d=2000',
        '--num_codes=64',
        '--anat_dim=32',
        '--joint=none',
        '--recon=l2',
        '--w_ssim=0',
        '--w_commit=0.025',
        '--lr=2e-3',
        '--lr_decay_iters=2000',
        '--ema_decay=0.9',
        '--log_interval=50',
        f'--out_dir={tmp_path}/a',
    )
    assert log_of(tmp_path / 'a')[-1]['val/psnr_db'] > 30

@pytest.mark.slow
def test_swapped_film_changes_the_contrast_and_not_the_anatomy(tmp_path):
    """One set of codes under the two modalities' FiLM, after the demo's first 300 steps: white matter turns from bright to dark, the brain stays."""
    play(
        'train_vae.py',
        f'{ROOT}/config/demo.py',
        '--max_iters=300',
        f'--data_dir={tmp_path}/data',
        f'--out_dir={tmp_path}/out',
        '--cross_start=100',
    )
    checkpoint = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    model, test = from_checkpoint(checkpoint), Sessions(tmp_path / 'data', ('T1w', 'T2w'), 'test')
    for i in range(min(test.n, 5)):
        labels = np.load(tmp_path / 'data' / test.rows[i]['dseg'])
        white, rest = np.isin(labels, (2, 41)), np.isin(labels, (3, 42, 24))
        x = torch.tensor(test.volume(i, 0))[None, None]
        with torch.no_grad():
            tokens = model.tokens(x)
            t1, t2 = (model.from_tokens(tokens, m)[0, 0].numpy() for m in (0, 1))
        assert t1[white].mean() > t1[rest].mean() + 0.05 and t2[white].mean() < t2[rest].mean() - 0.05
        a, b = t1 > 0.15, t2 > 0.15
        # one threshold cuts the fluid's rim, dark in one of them
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.85

@pytest.mark.parametrize('args, words', [
    (['--lrr=1'], ["unknown key 'lrr'", "'lr'"]), (['--lr=fast'], ['lr must be float']), (['--joint=both'], ['sequential, interleaved or none']),
    (['--film=False'], ['w_cross', 'film=True']), (['--data_dir=/nowhere/at/all'], ['/nowhere/at/all', 'prepare.py']),
    (['--modalities=T1w,FLAIR'], ['FLAIR', 'it has T1w, T2w']), (['--widths=16,16,16'], ['widths', 'four']),
    (['--patch=24,48,32'], ['24', 'multiple of 16']), (['--init_from=resume'], ['ckpt.pt', 'no such checkpoint']),
    (['--kind=gan'], ['neuroquant or convvae']), (['--kind=convvae', '--w_perc=1'], ['squeezenet1_1', 'no path given']),
    (['--kind=convvae', '--bottleneck=vq', '--num_codebooks=3', '--codebooks=split'], ['4 channels', '3 codebooks']), (['--recon=l3'], ['l1 or l2']), (['--quantizer=fsq', '--num_codes=24'], ['fsq', 'power of 2']), (['--kind=convvae', '--dims=2', '--synthesise=0.5'], ['--synthesise', 'dims=2']), (['--kind=convvae', '--dims=2', '--augment=True'], ['--augment', 'dims=2']), (['--freeze_encoder=True'], ['convvae']), (['--w_discriminator=1'], ['w_discriminator', 'convvae']),
    (['--kind=convvae', '--bottleneck=vq', '--w_kl=1'], ['w_kl', "bottleneck='kl'"]), (['--kind=convvae', '--dims=2', '--patch=16,16,16'], ['patch', 'dims=2']),
    (['--out_dir=/proc/nowhere'], ['/proc/nowhere', 'cannot write']), (['--init_from=pytest.ini'], ['pytest.ini', 'not a readable checkpoint'])])
def test_bad_settings_end_with_one_line(args, words, tiny_data, tmp_path):
    line = refuses('train_vae.py', *TINY, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/out', *args)
    assert all(word in line for word in words), line

def test_checkpoint_of_another_model_is_refused_with_the_difference(tiny_data, tmp_path):
    train(tiny_data, tmp_path / 'out', '--max_iters=1')
    line = refuses(
        'train_vae.py',
        *TINY,
        *SHORT,
        f'--data_dir={tiny_data}',
        f'--out_dir={tmp_path}/out',
        '--init_from=resume',
        '--num_codes=32',
    )
    assert 'another model' in line and 'num_codes 16 there, 32 here' in line

def test_a_changed_dataset_is_refused_on_resume(tiny_data, tmp_path):
    train(tiny_data, tmp_path / 'out', '--max_iters=1')
    table = tiny_data / 'subjects.tsv'
    table.write_text(table.read_text().replace('sub-05\tses-01\ttrain', 'sub-05\tses-01\tval'))
    args = [*TINY, *SHORT, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/out', '--max_iters=2']
    assert 'is not what' in refuses('train_vae.py', *args, '--init_from=resume')
    play('train_vae.py', *args, f'--init_from={tmp_path}/out/ckpt.pt')

def test_sigterm_finishes_the_step_saves_and_says_so(tiny_data, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            'train_vae.py',
            *TINY,
            '--iters_3d=10000',
            f'--data_dir={tiny_data}',
            f'--out_dir={tmp_path}/out',
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith('iter 3'): break
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and 'resume' in out and err == ''
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter_num'] >= 3
