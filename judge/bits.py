"""Bits per token that a GPT needs for scans it has not seen."""
import tempfile

from tqdm import tqdm

from common import load_checkpoint
from judge.metrics import summarise
from latents import encode_sessions, usual_dirs
from model import GPT, encoder_hash, from_checkpoint
from tokens import Tokens, baseline_bits, scan_bits

def load_gpts(paths, runs, device):
    """(path, checkpoint, GPT, the run whose tokens it knows) of each path.

    SystemExit with one line for another network, or one of an autoencoder that is not among the runs.
    """
    run_of = {encoder_hash(run.model): run for run in runs}
    loaded = []
    for path in paths:
        checkpoint = load_checkpoint(path)
        gpt = from_checkpoint(checkpoint).to(device)
        if not isinstance(gpt, GPT):
            raise SystemExit(f'--gpt={path}: not a GPT')
        if checkpoint['encoder_hash'] not in run_of:
            raise SystemExit(f'--gpt={path}: of the tokens of another autoencoder than --ckpt')
        loaded.append((path, checkpoint, gpt, run_of[checkpoint['encoder_hash']]))
    return loaded

def bits_rows(gpts, data_dir, split, device, dtype, seed):
    """A row for each of load_gpts: bits per token of the split's scans, and by frequencies in training."""
    rows = []
    for path, checkpoint, gpt, run in gpts:
        config = checkpoint['config']
        with tempfile.TemporaryDirectory() as anew:
            same = config['data_dir'] == data_dir
            latents_dir = config['latents_dir'] if same else usual_dirs(anew, data_dir)
            encode_sessions(run.model, data_dir, run.modalities, latents_dir, 0, 1, device)
            source = run.model.quantizer, device, latents_dir, data_dir, run.modalities
            train = Tokens(*source, 'train', checkpoint['conditions'])
            judged = Tokens(*source, split, checkpoint['conditions'])
        bits = scan_bits(gpt, judged, tqdm(range(judged.n), 'bits', leave=False), device, dtype)
        subjects = [row['subject'] for row, _ in judged.scans]
        row = {'row': path, 'of': run.name, 'bits': summarise(bits, subjects, seed=seed)}
        for name, values in baseline_bits(train.tokens, judged.tokens, gpt.config.num_codes).items():
            row[name] = summarise(values, subjects, seed=seed)['mean']
        rows.append(row)
    return rows
