"""Bits per token that a GPT needs for scans it has not seen."""
import os

from tqdm import tqdm

from common import load_checkpoint
from judge.metrics import summarise
from latents import encode_sessions
from model import GPT, encoder_hash, from_checkpoint
from tokens import Tokens, baseline_bits, scan_bits

def bits_rows(paths, runs, data_dir, split, device, dtype, seed):
    """A row for each GPT: bits per token of the split's scans, and what frequencies in the training set need.

    SystemExit with one line for another network, or one of an autoencoder that is not among the runs.
    """
    rows = []
    for path in paths:
        checkpoint = load_checkpoint(path)
        gpt = from_checkpoint(checkpoint).to(device)
        if not isinstance(gpt, GPT):
            raise SystemExit(f'--gpt={path}: not a GPT')
        matching = [run for run in runs if encoder_hash(run.model) == checkpoint['encoder_hash']]
        if not matching:
            raise SystemExit(f'--gpt={path}: of the tokens of another autoencoder than --ckpt')
        run = matching[0]
        folder = checkpoint['config']['latents_dir']
        if checkpoint['config']['data_dir'] != data_dir:
            folder = os.path.join(os.path.dirname(path) or '.', 'latents_judged')
        name = encoder_hash(run.model)
        encode_sessions(run.model, name, data_dir, run.modalities, folder, 0, 1, device)
        source = run.model.quantizer, device, folder, data_dir, run.modalities
        train = Tokens(*source, 'train', checkpoint['conditions'])
        judged = Tokens(*source, split, checkpoint['conditions'])
        bits = scan_bits(gpt, judged, tqdm(range(judged.n), 'bits', leave=False), device, dtype)
        subjects = [row['subject'] for row, _ in judged.scans]
        row = {'row': path, 'of': run.name, 'bits': summarise(bits, subjects, seed=seed)}
        rows.append(row | baseline_bits(train.tokens, judged.tokens, gpt.config.num_codes))
    return rows
