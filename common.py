"""What the scripts must agree on: settings, processes and devices, checkpoints, the log. Functions without state."""
import difflib
import json
import math
import os
import signal
import subprocess
import sys
from ast import literal_eval
from contextlib import nullcontext

import torch
import torch.distributed as dist

# ---------------------------------------------------------------- settings

def configure(g, argv):
    """Override a script's plain globals `g` from config files and --key=value flags, left to right; return them as a dict.

    Settings are the bool, int, float, str and tuple globals with lower-case names and no leading underscore. A config file holds
    `name = value` lines. An unknown key or a value of another type ends the program with one line.
    """
    known = {
        k: type(v)
        for k, v in g.items()
        if k[0] != '_' and k == k.lower() and type(v) in (bool, int, float, str, tuple)
    }

    def put(source, key, value):
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise SystemExit(
                f"{source}: unknown key '{key}'" + (f", did you mean '{near[0]}'?" if near else '')
            )
        want = known[key]
        if want is float and type(value) is int:
            value = float(value)  # lr=1 means 1.0
        if want is tuple and type(value) is not tuple:
            value = tuple(value) if type(value) is list else (value,)
        if type(value) is not want:
            raise SystemExit(f'{source}: {key} must be {want.__name__} like {g[key]!r}, got {value!r}')
        g[key] = value

    for arg in argv:
        if arg in ('-h', '--help'):
            print('settings, changed by --key=value or a config file:\n'
                  + '\n'.join(f'  --{k}={g[k]!r}' for k in known))
            raise SystemExit(0)
        if arg.startswith('--'):
            key, eq, text = arg[2:].partition('=')
            if not eq: raise SystemExit(f'{arg}: write --{key}=value')
            put(arg, key, parse(text, known.get(key)))
        else:
            namespace = {}  # its own, so that a misspelt name cannot hide among ours
            try:
                with open(arg) as f:
                    exec(compile(f.read(), arg, 'exec'), namespace)
            except OSError as e:
                raise SystemExit(f'{arg}: cannot read this config file ({e.strerror})')
            except Exception as e:
                raise SystemExit(f'{arg}: not a config file of name = value lines ({type(e).__name__}: {e})')
            for key, value in namespace.items():
                if key[0] != '_':
                    put(arg, key, value)
    return {k: g[k] for k in known}

def parse(text, want):
    """A flag's text as a value of type `want`: str stays as typed, a tuple may be written 1,2,3 or T1w,T2w."""
    if want is str: return text
    if want is tuple and not text.lstrip().startswith(('(', '[')):
        return tuple(parse(t.strip(), None) for t in text.split(',') if t.strip())
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # put() says which type was wanted

# ---------------------------------------------------------------- processes and devices

def start_processes(device):
    """Join the other processes if torchrun started us. device: '' picks cuda when there is one.

    returns rank, world (1 when alone), and the device string of this process
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device.startswith('cuda') and not torch.cuda.is_available():
        raise SystemExit(f'--device={device}: this torch sees no CUDA device; use --device=cpu')
    warn_of_slow_convolutions(device, torch.__version__, torch.backends.cudnn.version() or 0)
    if 'RANK' not in os.environ: return 0, 1, device
    if device == 'cuda':
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
    return dist.get_rank(), dist.get_world_size(), device

def warn_of_slow_convolutions(device, version, cudnn):
    """One line for torch 2.9 with a cuDNN before 9.15, where 3D convolutions in bfloat16 take 3 to 4 times the time and memory.

    Sources: pytorch#166122, pytorch#166643.
    """
    if (
        device.startswith('cuda')
        and version.startswith('2.9.')
        and cudnn < 91500
        and os.environ.get('RANK', '0') == '0'
    ):
        print(
            f'torch {version} with cuDNN {cudnn}: 3D convolutions in bfloat16 are slow and take much memory; '
            'upgrade torch, or pip install nvidia-cudnn-cu12>=9.15',
            flush=True,
        )

def stop_processes():
    if dist.is_initialized():
        dist.destroy_process_group()

def explain_failures(keys):
    """From now on two errors end the program with one line: out of GPU memory, with the peak and the settings that lower it; a lost process."""
    usual = sys.excepthook
    signs = (
        'Connection closed by peer', 'Connection reset', 'Broken pipe', 'Socket', 'NCCL', 'remote process'
    )
    def hook(kind, error, trace):
        lost = dist.is_initialized() and any(sign in str(error) for sign in signs)
        if issubclass(kind, torch.OutOfMemoryError):
            peak = (
                f'{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB'
                if torch.cuda.is_available()
                else 'not known'
            )
            print(f'out of GPU memory, peak {peak}: lower {keys}', file=sys.stderr)
        elif lost:
            reason = str(error).strip().splitlines()[0]
            print(
                f'process {dist.get_rank()}: another process is gone ({reason}); its own message says why',
                file=sys.stderr,
            )
        else:
            usual(kind, error, trace)
    sys.excepthook = hook

def catch_signals():
    """From now on SIGINT and SIGTERM only note their number; returns stop_signal(), which says which one came, 0 for none.

    stop_signal() gives every process the same answer, since a signal may reach one of them only, or each at another step.
    """
    came = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: came.append(number))
    def stop_signal():
        if not dist.is_initialized(): return came[0] if came else 0
        number = torch.tensor(came[0] if came else 0)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)
    return stop_signal

def print0(*args):
    """Print on the first process only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*args, flush=True)

def all_reduce_mean(tensors):
    """Replace each tensor by its mean over the processes, in one message. All processes must pass the same shapes."""
    if not dist.is_initialized() or not tensors: return
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for t, new in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.detach().copy_(new.view_as(t))

def autocast(device, dtype):
    """Context for mixed precision; dtype 'bfloat16' or 'float32' (no autocast)."""
    if dtype not in ('bfloat16', 'float32'):
        raise SystemExit(f'--dtype={dtype}: bfloat16 or float32')
    if dtype == 'float32': return nullcontext()
    return torch.autocast(device.split(':')[0], dtype=torch.bfloat16)

def peak_flops(device):
    """Dense bf16 peak of the card in FLOP/s from its data sheet, 0 where it is not known (no MFU is printed then)."""
    if not device.startswith('cuda'): return 0.0
    name = torch.cuda.get_device_name(device)
    table = {
        'H200': 989e12,
        'H100': 989e12,
        'A100': 312e12,
        'L40S': 362e12,
        'A40': 150e12,
        'RTX 4090': 165e12,
        'RTX 3090': 71e12,
        'A6000': 155e12,
    }
    return next((peak for key, peak in table.items() if key in name), 0.0)

# ---------------------------------------------------------------- weights

@torch.no_grad()
def update_average(average, model, decay):
    """Exponential average of weights: average <- decay average + (1 - decay) model. Buffers, the codebook among them, are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for a, b in zip(average.buffers(), model.buffers()):
        a.copy_(b)

def save_checkpoint(path, checkpoint):
    """Write beside, then rename: `path` always holds a whole checkpoint. Plain types and tensors only."""
    part = f'{path}.part'
    try:
        torch.save(checkpoint, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        if os.path.exists(part):
            os.remove(part)
        raise SystemExit(f'{path}: cannot write the checkpoint ({e}); the previous one is untouched')

def load_checkpoint(path, device='cpu'):
    """A checkpoint of train_vae.py or train_flow.py as a dict; anything else ends the program with one line."""
    if not os.path.isfile(path): raise SystemExit(f'{path}: no such checkpoint')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:
        raise SystemExit(f'{path}: not a readable checkpoint ({type(e).__name__}); was the file cut short?')
    if not isinstance(checkpoint, dict) or 'model_args' not in checkpoint:
        raise SystemExit(f'{path}: not a checkpoint of this project (it has no model_args)')
    return checkpoint

def refuse_changes(checkpoint, config, world, free):
    """SystemExit that shows every setting that differs from the checkpoint's and is not among `free`, names without influence on results.

    batch_size may change if the processes do: what counts is the joined batch.
    """
    def joined(config, world):
        return {k: world * v if k.startswith('batch_size') else v for k, v in config.items()}
    there, here = joined(checkpoint['config'], checkpoint['world']), joined(config, world)
    differ = [
        f'{k} {there.get(k)!r} there, {here[k]!r} here'
        for k in here
        if k not in free and there.get(k) != here[k]
    ]
    if differ:
        raise SystemExit(
            f'--init_from=resume goes on with one run, but its settings have changed: {"; ".join(differ)}; '
            'restore them, or add --resume_changed=True to go on regardless'
        )

def check_finite(recent):
    """SystemExit at the first value that is not finite. recent: [(iteration, names of the values, values (n,), files of the batch)]."""
    for it, names, values, files in recent:
        for name, value in zip(names, values.tolist()):
            if not math.isfinite(value):
                raise SystemExit(
                    f'iteration {it}: {name} is {value}; the batch of this process was {", ".join(files)}; '
                    'ckpt.pt holds the last good state'
                )

# ---------------------------------------------------------------- output folder and log

def make_out_dir(path):
    """Create the folder and prove that it can be written; one line and exit otherwise."""
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f'.probe{os.getpid()}')
        with open(probe, 'w'):
            pass
        os.remove(probe)
    except OSError as e:
        raise SystemExit(f'{path}: cannot write there ({e.strerror}); choose another --out_dir')

def write_text(path, text):
    """Write a small text file whole or not at all."""
    part = f'{path}.{os.getpid()}.part'  # jobs of an array may write the same file
    with open(part, 'w') as f:
        f.write(text)
    os.replace(part, path)

def markdown_table(head, rows):
    """Lines of a markdown table; rows are lists of what is to be printed, as many as head has columns."""
    return ['| ' + ' | '.join(map(str, line)) + ' |' for line in (head, ['---'] * len(head), *rows)]

def log_json(out_dir, record):
    """Append one JSON line to out_dir/log.jsonl; numbers that are not finite become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with open(os.path.join(out_dir, 'log.jsonl'), 'a') as f:
        f.write(json.dumps(clean) + '\n')

def read_log(out_dir):
    """Whole lines of out_dir/log.jsonl; a last one that a kill cut short is left out."""
    try:
        with open(os.path.join(out_dir, 'log.jsonl')) as f:
            return [line for line in f if line.endswith('}\n')]
    except FileNotFoundError:
        return []

def open_log(out_dir, config, wandb_project, it):
    """Write the settings to out_dir/config.py and return log(record), which appends to log.jsonl and, if a project is named, to wandb.

    A record is a dict of numbers with 'iter'. Lines after iteration `it` are dropped first: those steps will be taken again.
    Only the first process writes.
    """
    if dist.is_initialized() and dist.get_rank(): return lambda record: None
    write_text(os.path.join(out_dir, 'config.py'), ''.join(f'{k} = {v!r}\n' for k, v in config.items()))
    write_text(
        os.path.join(out_dir, 'log.jsonl'),
        ''.join(line for line in read_log(out_dir) if json.loads(line)['iter'] <= it),
    )
    if wandb_project:
        try:
            import wandb
        except ImportError:
            raise SystemExit('--wandb_project needs wandb: pip install wandb, or leave it empty')
        wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=config)
    def log(record):
        log_json(out_dir, record)
        if wandb_project:
            wandb.log(record, step=record['iter'])
    return log

def git_commit():
    """Short commit of the source, with + when it was edited; '' outside a repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        return subprocess.run(
            ['git', 'describe', '--always', '--dirty=+', '--exclude=*'],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ''
