"""train_flow.py and sample.py --mode=generate as a user runs them, on the latents of small autoencoders."""
import json
import os
import re
from itertools import combinations

import nibabel as nib
import numpy as np
import pytest
import torch

from common import load_checkpoint, save_checkpoint
from conftest import TINY, make_tiny_data, play, play_two, refuses
from judge.novelty import nearest
from judge.sets import generated_files
from latents import Latents, encode_conditions
from losses import ms_ssim
from model import ConvVAE, ConvVAEConfig, encoder_hash, from_checkpoint, model_args
from test_train import assert_same_tensors, log_of, training_lines

MODALITIES = ('T1w', 'T2w')
FLOW = ['--widths=8,16', '--res_blocks=1', '--attention=False,True', '--head_width=8', '--batch_size=2',
        '--iters=4', '--muon=True', '--log_interval=1', '--device=cpu']
KL = [*TINY, '--kind=convvae', '--widths=16,16', '--latent_dim=3', '--w_ssim=0', '--w_kl=1e-3', '--iters=2',
      '--eval_sessions=1']

def train_vae(data, out, *args):
    """Path of the checkpoint of a small autoencoder; args instead of those of a KL autoencoder."""
    play('train_vae.py', *(args or KL), f'--data_dir={data}', f'--out_dir={out}')
    return f'{out}/ckpt.pt'

def train_flow(vae, out, *args):
    play('train_flow.py', *FLOW, f'--vae={vae}', f'--out_dir={out}', *args)
    return load_checkpoint(f'{out}/ckpt.pt')

def drawing(flow, out):
    return ['sample.py', '--mode=generate', f'--ckpt={flow}/ckpt.pt', f'--output={out}', '--device=cpu']

def generate(flow, out, *args):
    """The latents of generated volumes."""
    play(*drawing(flow, out), '--steps=3', *args)
    return np.load(f'{out}/latents.npy')

def image(path):
    return nib.load(path).get_fdata(dtype=np.float32)

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A folder with data, a KL autoencoder in vae/ and a flow on its latents in flow/; not to be changed."""
    folder = tmp_path_factory.mktemp('run')
    make_tiny_data(folder / 'data')
    train_flow(train_vae(folder / 'data', folder / 'vae'), folder / 'flow')
    return folder

def load_model(path):
    return from_checkpoint(load_checkpoint(path))

# ---------------------------------------------------------------- latents

def test_latents_are_written_once_and_an_interrupted_write_is_mended(tiny_data, tmp_path):
    vae = train_vae(tiny_data, tmp_path / 'vae')
    train_flow(vae, tmp_path / 'a', '--max_iters=1')
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / 'vae' / 'latents_data').glob('*.npy')}
    assert len(written) == 22
    for path in written:
        latent = np.load(path)
        assert latent.shape == (2, 3, 16, 24, 16) and latent.dtype == np.float16
    victim = next(iter(written))
    victim.write_bytes(victim.read_bytes()[:100])
    train_flow(vae, tmp_path / 'b', '--max_iters=1')
    assert {path for path in written if path.stat().st_mtime_ns != written[path]} == {victim}

def test_a_scan_that_was_prepared_anew_is_encoded_anew(tiny_data, tmp_path):
    vae = train_vae(tiny_data, tmp_path / 'vae')
    train_flow(vae, tmp_path / 'a', '--max_iters=1')
    latent = tmp_path / 'vae' / 'latents_data' / 'sub-00_ses-01_T1w.npy'
    others = latent.with_name('sub-01_ses-01_T1w.npy')
    before, untouched = np.load(latent), others.stat().st_mtime_ns
    scan = tiny_data / latent.name
    np.save(scan, np.load(scan)[::-1])
    train_flow(vae, tmp_path / 'b', '--max_iters=1')
    assert not np.array_equal(np.load(latent), before)
    assert others.stat().st_mtime_ns == untouched

def test_a_flow_learns_several_data_sets_each_with_latents_of_its_own(run, tmp_path):
    """The other one has no T2w, and people of the same names."""
    other = make_tiny_data(tmp_path / 'other')
    table = other / 'subjects.tsv'
    table.write_text(re.sub(r'\tsub-.._ses-01_T2w.npy', '\t', table.read_text()))
    both = f"{run / 'data'},{other}"
    vae = train_vae(both, tmp_path / 'vae')
    train_flow(vae, tmp_path / 'flow', '--max_iters=1')
    latents = [tmp_path / 'vae' / f'latents_{name}' for name in ('data', 'other')]
    assert [len(list(folder.glob('*.npy'))) for folder in latents] == [22, 11]
    train_set = Latents(','.join(map(str, latents)), both, MODALITIES, 'train', ())
    assert train_set.n == 14 + 7
    assert [row['folder'] for row, _ in train_set.scans] == [str(run / 'data')] * 14 + [str(other)] * 7
    first_of_other = np.load(latents[1] / train_set.file(14)).astype(np.float32)
    assert np.array_equal(train_set.load(14)[0], first_of_other[0])
    generate(tmp_path / 'flow', tmp_path / 'new', '--n=1')
    assert re.search('(data|other)/sub-', (tmp_path / 'new' / 'nearest.md').read_text())
    written = {path: path.stat().st_mtime_ns for path in latents[0].glob('*.npy')}
    train_flow(vae, tmp_path / 'alone', f"--data_dir={run / 'data'}", '--max_iters=1')
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())

def test_several_data_sets_want_as_many_folders_of_latents(run, tmp_path):
    line = refuses('train_flow.py', *FLOW, f'--vae={run}/vae/ckpt.pt', f'--out_dir={tmp_path}/x',
                   f'--data_dir={run}/data,{run}/data', f'--latents_dir={tmp_path}/one')
    assert f'--latents_dir={tmp_path}/one: give as many folders' in line

def posterior_and_stored(run):
    """For each scan of the training set: the posterior, and what was stored of it."""
    model = load_model(run / 'vae' / 'ckpt.pt')
    train_set = Latents(run / 'vae' / 'latents_data', run / 'data', MODALITIES, 'train', ())
    assert train_set.n == 14
    for k in range(train_set.n):
        row, m = train_set.scans[k]
        x = torch.tensor(np.load(run / 'data' / row[MODALITIES[m]]))[None, None]
        with torch.no_grad():
            posterior = model.posterior(x)
        yield posterior, train_set.load(k)

def test_latents_are_the_posterior(run):
    for (mean, logvar), (stored_mean, stored_logvar) in posterior_and_stored(run):
        np.testing.assert_allclose(stored_mean, mean[0], atol=2e-3)
        np.testing.assert_allclose(stored_logvar, logvar[0], atol=2e-2)

def test_the_flow_knows_mean_and_sd_of_draws_from_the_posterior(run, tmp_path):
    checkpoint = train_flow(run / 'vae' / 'ckpt.pt', tmp_path / 'a', '--normalise=channel')
    draws = []
    for (mean, logvar), _ in posterior_and_stored(run):
        draws.append(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
    draws = torch.cat(draws)
    axes = (0, 2, 3, 4)
    weights = checkpoint['model']
    torch.testing.assert_close(weights['latent_mean'], draws.mean(axes), atol=0.02, rtol=0.02)
    torch.testing.assert_close(weights['latent_sd'], draws.std(axes), atol=0.02, rtol=0.02)
    flow = from_checkpoint(checkpoint)
    torch.testing.assert_close(flow.denormalise(flow.normalise(draws)), draws, atol=1e-5, rtol=1e-5)
    assert flow.normalise(draws).var(axes).sub(1).abs().max() < 0.05

def test_a_batch_of_latents_is_a_function_of_the_step(run):
    train_set = Latents(run / 'vae' / 'latents_data', run / 'data', MODALITIES, 'train', ())
    first = train_set.batch(0, 2)['mean']
    assert torch.equal(first, train_set.batch(0, 2)['mean'])
    assert not torch.equal(first, train_set.batch(1, 2)['mean'])

def test_conditions_are_encoded_and_dropped():
    values = [{'modality': 'T2w', 'sex': 'F', 'age': 40.0}, {'modality': 'T1w', 'sex': None, 'age': None}, {}]
    cond = encode_conditions(values, ('modality', 'sex', 'age'), MODALITIES)
    assert cond['classes'].tolist() == [[1, 0], [0, 2], [2, 2]]
    torch.testing.assert_close(cond['vectors'][0], torch.tensor([[0.4, 1.0], [0.0, 0.0], [0.0, 0.0]]))
    assert encode_conditions(values, (), ('T1w',)) is None

def test_nearest_finds_a_memorised_one_at_distance_0():
    library = np.random.default_rng(0).normal(size=(5, 4, 3))
    memorised, close = nearest([library[3], library[1] + 0.1], enumerate(library))
    assert memorised == (3, 0.0)
    assert close[0] == 1 and close[1] == pytest.approx(0.1)

def test_nearest_is_that_of_one_distance_at_a_time():
    rng = np.random.default_rng(0)
    library = rng.normal(size=(40, 6, 5)).astype(np.float32) + 7
    queries = rng.normal(size=(9, 6, 5)).astype(np.float32) + 7
    distances = np.sqrt(np.square(queries[:, None] - library).mean((2, 3)))
    for row, (key, distance) in zip(distances, nearest(queries, enumerate(library))):
        assert key == row.argmin() and distance == pytest.approx(row.min(), rel=1e-6)

def test_encoder_hash_is_that_of_checkpoints_from_before_norms_could_be_chosen():
    torch.manual_seed(0)
    model = ConvVAE(ConvVAEConfig(widths=(8, 8)))
    args = model_args(model)
    assert args.pop('norm') == 'group'
    before = from_checkpoint({'model_args': args, 'model': model.state_dict()})
    with torch.no_grad():
        for p in before.parameters():
            p.fill_(0.5)
    assert encoder_hash(before) == '9dfb7d68e573ec46'

def test_encoder_hash_names_the_encoder_alone(run):
    model = load_model(run / 'vae' / 'ckpt.pt')
    name = encoder_hash(model)
    torch.nn.init.ones_(model.decoder.blocks[0].conv.weight)
    assert encoder_hash(model) == name
    with torch.no_grad():
        model.mu_head.weight[0] += 1e-3
    assert encoder_hash(model) != name

# ---------------------------------------------------------------- training

def test_a_resumed_flow_has_the_same_bits(run, tmp_path):
    vae = run / 'vae' / 'ckpt.pt'
    train_flow(vae, tmp_path / 'b', '--max_iters=2')
    parts = train_flow(vae, tmp_path / 'b', '--init_from=resume')
    assert_same_tensors(load_checkpoint(run / 'flow' / 'ckpt.pt'), parts)
    assert training_lines(run / 'flow') == training_lines(tmp_path / 'b')

def test_a_run_of_an_earlier_version_is_refused(run, tmp_path):
    checkpoint = load_checkpoint(run / 'flow' / 'ckpt.pt')
    del checkpoint['muon']
    save_checkpoint(tmp_path / 'ckpt.pt', checkpoint)
    args = [*FLOW, f'--vae={run}/vae/ckpt.pt', f'--out_dir={tmp_path}', '--init_from=resume']
    assert 'earlier version' in refuses('train_flow.py', *args)

def test_validation_logs_the_loss_at_ten_times(run):
    bins = [key for line in log_of(run / 'flow') for key in line if key.startswith('val/loss_t')]
    assert len(bins) == 10

def test_two_processes_train_the_flow_of_one(run, tmp_path):
    vae = run / 'vae' / 'ckpt.pt'
    conditioned = ['--conditions=modality,sex,age', '--p_drop=0.5', '--eval_scans=3']
    one = train_flow(vae, tmp_path / 'one', *conditioned)
    play_two('train_flow.py', *FLOW, f'--vae={vae}', *conditioned, f'--out_dir={tmp_path}/two',
             '--batch_size=1', port=29513)
    two = load_checkpoint(tmp_path / 'two' / 'ckpt.pt')
    for a, b in zip(log_of(tmp_path / 'one'), log_of(tmp_path / 'two')):
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
    for key, value in one['model'].items():
        torch.testing.assert_close(two['model'][key], value, rtol=1e-3, atol=1e-4)

# ---------------------------------------------------------------- generating

def test_a_generated_latent_depends_on_its_seed_and_number_alone(run, tmp_path):
    two = generate(run / 'flow', tmp_path / 'two', '--n=2')
    three = generate(run / 'flow', tmp_path / 'three', '--n=3')
    assert np.array_equal(two, three[:2]) and not np.array_equal(three[0], three[1])
    assert not np.array_equal(two, generate(run / 'flow', tmp_path / 'seed', '--n=2', '--seed=1'))
    assert not np.array_equal(two, generate(run / 'flow', tmp_path / 'heun', '--n=2', '--method=heun'))

def test_generated_volumes_are_what_the_decoder_makes_of_the_latents(run, tmp_path):
    z = generate(run / 'flow', tmp_path / 'out', '--n=2')
    files = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert files == ['latents.npy', 'montage.png', 'nearest.md', 'sample_000.nii.gz', 'sample_001.nii.gz']
    with torch.no_grad():
        want = load_model(run / 'vae' / 'ckpt.pt').from_latent(torch.from_numpy(z)).clamp(0, 1)
    for k in range(2):
        np.testing.assert_allclose(image(tmp_path / 'out' / f'sample_00{k}.nii.gz'), want[k, 0], atol=1e-4)

def test_generated_volumes_lie_around_the_origin_in_ras(run, tmp_path):
    generate(run / 'flow', tmp_path / 'out', '--n=1')
    scan = nib.load(tmp_path / 'out' / 'sample_000.nii.gz')
    assert scan.shape == (32, 48, 32) and nib.aff2axcodes(scan.affine) == ('R', 'A', 'S')
    np.testing.assert_allclose((scan.affine @ [15.5, 23.5, 15.5, 1])[:3], 0, atol=1e-6)

def test_generated_volumes_have_the_voxels_of_the_flows_data(run, tmp_path):
    """The autoencoder learned others, at 1 mm."""
    data = make_tiny_data(tmp_path / 'data')
    facts = json.loads((data / 'dataset.json').read_text())
    (data / 'dataset.json').write_text(json.dumps(facts | {'spacing_mm': 2.5}))
    train_flow(f'{run}/vae/ckpt.pt', tmp_path / 'flow', f'--data_dir={data}', '--max_iters=1',
               f'--latents_dir={tmp_path}/latents')
    generate(tmp_path / 'flow', tmp_path / 'new', '--n=1')
    assert nib.load(tmp_path / 'new' / 'sample_000.nii.gz').header.get_zooms() == (2.5, 2.5, 2.5)

def test_volumes_drawn_of_a_modality_have_its_name(run, tmp_path):
    """evaluate.py compares a volume of no name with scans of every modality."""
    train_flow(f'{run}/vae/ckpt.pt', tmp_path / 'flow', '--conditions=modality', '--max_iters=1')
    for target in MODALITIES:
        generate(tmp_path / 'flow', tmp_path / target, '--n=1', f'--target={target}')
        assert (tmp_path / target / f'sample_000_{target}.nii.gz').exists()

def test_a_target_without_effect_is_refused(run, tmp_path):
    line = refuses(*drawing(run / 'flow', tmp_path / 'new'), '--steps=3', '--n=1', '--target=T2w')
    assert '--target=T2w' in line and 'without the condition modality' in line

def test_a_fine_tuned_decoder_draws_the_same_latents_another_way(run, tmp_path):
    z = generate(run / 'flow', tmp_path / 'out', '--n=1')
    tuned = train_vae(run / 'data', tmp_path / 'tuned_vae', *KL, '--freeze_encoder=True',
                      f"--init_from={run / 'vae' / 'ckpt.pt'}", '--lr=0.1')
    assert np.array_equal(z, generate(run / 'flow', tmp_path / 'tuned', '--n=1', f'--vae={tuned}'))
    volumes = [image(tmp_path / folder / 'sample_000.nii.gz') for folder in ('out', 'tuned')]
    assert not np.array_equal(*volumes)

def test_volumes_of_an_earlier_call_are_refused(run, tmp_path):
    generate(run / 'flow', tmp_path / 'out', '--n=2')
    line = refuses(*drawing(run / 'flow', tmp_path / 'out'), '--n=1', '--steps=3')
    assert 'holds 2 volumes of an earlier call, such as sample_000.nii.gz' in line

def test_more_than_a_thousand_volumes_are_read_in_order(tmp_path):
    for k in (7, 1000, 99):
        (tmp_path / f'sample_{k:03d}.nii.gz').touch()
        (tmp_path / f'sample_{k:03d}_T1w.nii.gz').touch()
    (tmp_path / 'sample_mean.nii.gz').touch()
    names = [os.path.basename(path) for path in generated_files(tmp_path)]
    assert names == ['sample_007.nii.gz', 'sample_099.nii.gz', 'sample_1000.nii.gz']
    assert len(generated_files(tmp_path, 'T1w')) == 3

def test_another_encoder_is_refused(run, tmp_path):
    other = train_vae(run / 'data', tmp_path / 'other_vae', *KL, '--seed=3')
    assert 'same encoder' in refuses(*drawing(run / 'flow', tmp_path / 'x'), f'--vae={other}')
    other_latents = [f'--vae={other}', f"--latents_dir={run / 'vae' / 'latents_data'}"]
    line = refuses('train_flow.py', *FLOW, *other_latents, f'--out_dir={tmp_path}/x')
    assert 'latents of another autoencoder' in line

def test_neuroquant_gives_every_modality_of_each_new_brain(tiny_data, tmp_path):
    vae = train_vae(tiny_data, tmp_path / 'nq', *TINY, '--iters_3d=2', '--joint=none')
    train_flow(vae, tmp_path / 'flow', '--conditions=modality,sex,age', '--p_drop=0.5')
    wanted = ['--target=T2w', '--sex=F', '--age=40', '--guidance=2']
    z = generate(tmp_path / 'flow', tmp_path / 'out', '--n=1', *wanted)
    files = sorted(path.name for path in (tmp_path / 'out').glob('*.nii.gz'))
    assert files == ['sample_000_T1w.nii.gz', 'sample_000_T2w.nii.gz']
    model = load_model(vae)
    for m in MODALITIES:
        with torch.no_grad():
            want = model.from_latent(torch.from_numpy(z), m).clamp(0, 1)[0, 0]
        np.testing.assert_allclose(image(tmp_path / 'out' / f'sample_000_{m}.nii.gz'), want, atol=1e-5)
    for args, words in ((['--sex=x'], 'F or M'), (['--target=CT'], 'knows T1w, T2w')):
        assert words in refuses(*drawing(tmp_path / 'flow', tmp_path / 'x'), *args)

# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize('args, words', [
    (['--vae=RUN/flow/ckpt.pt'], 'not an autoencoder'),
    (['--vae=/nowhere.pt'], 'no such checkpoint'),
    (['--data_dir=/nowhere/data'], '/nowhere/data'),
    (['--conditions=weight,'], 'only modality, sex and age'),
    (['--times=cosine'], 'uniform or logit_normal'),
    (['--out_dir=RUN/flow', '--init_from=resume', '--widths=16,16'], 'another model')])
def test_bad_settings_of_training_end_with_one_line(args, words, run, tmp_path):
    args = [arg.replace('RUN', str(run)) for arg in args]
    line = refuses('train_flow.py', *FLOW, f'--vae={run}/vae/ckpt.pt', f'--out_dir={tmp_path}/x', *args)
    assert words in line

def test_a_condition_that_no_scan_has_is_refused(tiny_data, tmp_path):
    vae = train_vae(tiny_data, tmp_path / 'vae')
    table = tiny_data / 'subjects.tsv'
    table.write_text(table.read_text().replace('\tF\t30', '\t\t'))
    line = refuses('train_flow.py', *FLOW, f'--vae={vae}', f'--out_dir={tmp_path}/x', '--conditions=age,')
    assert 'no training scan with a known age' in line

def test_validation_scans_may_all_lack_a_condition(tiny_data, tmp_path):
    vae = train_vae(tiny_data, tmp_path / 'vae')
    table = tiny_data / 'subjects.tsv'
    lines = table.read_text().splitlines()
    lines = [line.replace('\tF\t30', '\tF\t') if '\tval\t' in line else line for line in lines]
    table.write_text('\n'.join(lines) + '\n')
    play('train_flow.py', *FLOW, f'--vae={vae}', f'--out_dir={tmp_path}/x', '--conditions=age,')

@pytest.mark.parametrize('args, words', [
    (['--steps=0'], 'at least 1'),
    (['--sex=F'], 'trained with conditions none'),
    (['--ckpt=RUN/vae/ckpt.pt'], 'wants a flow'),
    (['--mode=reconstruct', '--input=a.nii'], 'wants an autoencoder')])
def test_bad_settings_of_generating_end_with_one_line(args, words, run, tmp_path):
    args = [arg.replace('RUN', str(run)) for arg in args]
    assert words in refuses(*drawing(run / 'flow', tmp_path / 'x.nii'), *args)

def test_a_flow_is_not_evaluated(run, tmp_path):
    args = [f'--ckpt={run}/flow/ckpt.pt', f'--data_dir={run}/data', f'--out_dir={tmp_path}', '--device=cpu']
    assert 'a flow' in refuses('evaluate.py', *args)

# ---------------------------------------------------------------- evaluate.py on generated volumes

@pytest.fixture(scope='module')
def generated(run):
    """Folder of three generated volumes."""
    generate(run / 'flow', run / 'new', '--n=3')
    return run / 'new'

def evaluation(run, out, *args):
    """What evaluate.py prints, and its table.json."""
    printed = play('evaluate.py', f'--ckpt={run}/vae/ckpt.pt', f'--data_dir={run}/data', f'--out_dir={out}',
                   '--split=train', '--device=cpu', '--reference_sessions=0', *args)
    return printed, json.loads((out / 'table.json').read_text())

def test_frechet_distances_of_reconstructed_and_generated_slices(run, generated, tmp_path):
    args = ['--max_sessions=4', '--features=random', f'--generated={generated}']
    printed, table = evaluation(run, tmp_path, *args)
    assert 'RANDOM features' in printed and 'gFID - rFID' in printed
    names = [row['row'] for row in table['frechet']]
    assert names == ['floor: real against real', 'vae/ckpt rFID', 'vae/ckpt gFID'] * 2
    rows = {(row['row'], row['modality']): row for row in table['frechet']}
    assert rows['vae/ckpt rFID', 'T1w']['mean'] > rows['floor: real against real', 'T1w']['mean'] > 0
    assert rows['vae/ckpt gFID', 'T2w']['slices']['axial'] == [3 * 32, 3 * 32]

def test_diversity_is_ms_ssim_between_pairs(run, generated, tmp_path):
    _, table = evaluation(run, tmp_path, '--max_sessions=4', f'--generated={generated}')
    real, new = (row for row in table['diversity'] if row['modality'] == 'T1w')
    assert (real['row'], real['volumes'], real['pairs']) == ('real', 4, 6)
    volumes = [torch.from_numpy(image(path))[None, None] for path in sorted(generated.glob('*.nii.gz'))]
    want = [ms_ssim(a, b).item() for a, b in combinations(volumes, 2)]
    assert new['ms_ssim'] == pytest.approx(np.mean(want), abs=1e-4)
    assert os.path.getsize(tmp_path / 'samples.png') > 10000

def test_frechet_rows_that_cannot_be_computed_say_why(run, tmp_path):
    _, table = evaluation(run, tmp_path, '--features=random', '--max_sessions=1', '--fid_slices=central')
    reasons = {row['row']: row['reason'] for row in table['frechet']}
    assert reasons.keys() == {'vae/ckpt rFID', 'floor: real against real'}
    assert 'more slices than features' in reasons['vae/ckpt rFID']
    assert 'no volumes' in reasons['floor: real against real']

def test_missing_weights_cost_one_line_and_no_other_row(run, tmp_path):
    printed, _ = evaluation(run, tmp_path, '--max_sessions=1', '--features=/nowhere.pth')
    assert 'RadImageNet-ResNet50_notop.pth' in printed and '| vae/ckpt | 2x |' in printed
