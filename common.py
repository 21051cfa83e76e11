"""What the scripts must agree on: settings, processes and devices, checkpoints, and the log of a run."""
import csv
import difflib
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from ast import literal_eval
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

# ---------------------------------------------------------------- settings

def configure(g, argv):
    """Override a script's plain globals `g` from config files and --key=value flags; return them as a dict.

    Arguments count from left to right. Settings are the bool, int, float, str and tuple globals with
    lower-case names and no leading underscore. A config file holds `name = value` lines. An unknown key or a
    value of another type ends the program with one line.
    """
    known = {}
    for name, value in g.items():
        if name[0] != '_' and name == name.lower() and type(value) in (bool, int, float, str, tuple):
            known[name] = type(value)

    def put(source, key, value):
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f", did you mean '{near[0]}'?" if near else ''
            raise SystemExit(f"{source}: unknown key '{key}'{hint}")
        want = known[key]
        if want is float and type(value) is int:
            value = float(value)  # lr=1 means 1.0
        if want is tuple and type(value) is not tuple:
            value = tuple(value) if type(value) is list else (value,)
        if type(value) is not want:
            raise SystemExit(f'{source}: {key} must be {want.__name__} like {g[key]!r}, got {value!r}')
        g[key] = value

    for arg in argv:
        if arg in ('-h', '--help'): continue
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            if not equals: raise SystemExit(f'{arg}: write --{key}=value')
            put(arg, key, parse(text, known.get(key)))
        else:
            for key, value in read_config(arg).items():
                put(arg, key, value)
    if '-h' in argv or '--help' in argv:
        print(help_text(g, known))
        raise SystemExit(0)
    return {key: g[key] for key in known}

def help_text(g, known):
    """The script's first lines, and its settings as they stand with the comments beside them."""
    lines = [g['__doc__'] or '', 'Settings, changed by --key=value or a config file, with their values now:']
    heading = ''
    with open(g['__file__']) as f:
        for line in f:
            name, _, rest = line.rstrip('\n').partition(' = ')
            if name in known:
                if heading:
                    lines += ['', heading]
                setting = f'  --{name}={g[name]!r}'
                comment = rest.partition('# ')[2]
                lines.append(f'{setting:<40}  {comment}' if comment else setting)
            heading = line[2:].strip() if line.startswith('# ') else ''
    return '\n'.join(lines)

def refuse_below_one(settings, *names):
    """SystemExit for a setting that counts something and is less than 1."""
    for name in names:
        if settings[name] < 1: raise SystemExit(f'--{name}={settings[name]}: at least 1')

def read_config(path):
    """The names that a config file sets, in a dict of their own: a misspelt one cannot hide among ours."""
    namespace = {}
    try:
        with open(path) as f:
            exec(compile(f.read(), path, 'exec'), namespace)
    except OSError as e:
        raise SystemExit(f'{path}: cannot read this config file ({e.strerror})')
    except Exception as e:
        raise SystemExit(f'{path}: not a config file of name = value lines ({type(e).__name__}: {e})')
    return {key: value for key, value in namespace.items() if key[0] != '_'}

def parse(text, want):
    """A flag's text as a value of type `want`: a str as typed, a tuple perhaps written 1,2,3 or T1w,T2w."""
    if want is str: return text
    if want is tuple and not text.lstrip().startswith(('(', '[')):
        return tuple(parse(item.strip(), None) for item in text.split(',') if item.strip())
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # put() says which type was wanted

# ---------------------------------------------------------------- processes and devices

def start_processes(device):
    """Join the other processes if torchrun started us. device: '' picks cuda when there is one.

    float32 means float32 from here on, in convolutions too: torch would let cuDNN drop 13 of its 24 bits.
    returns rank, world (1 when alone), and the device string of this process
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if not device.startswith(('cuda', 'cpu')):
        raise SystemExit(f'--device={device}: cuda or cpu; others, mps among them, are not supported')
    if device.startswith('cuda') and not torch.cuda.is_available():
        raise SystemExit(f'--device={device}: this torch sees no CUDA device; use --device=cpu')
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    alone = 'RANK' not in os.environ
    if device == 'cuda' and not alone:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith('cuda:'):
        torch.cuda.set_device(device)
    if alone: return 0, 1, device
    dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
    return dist.get_rank(), dist.get_world_size(), device

def wait_for_all():
    """Wait until every process is here, days if need be: NCCL gives up after ten minutes."""
    if dist.is_initialized():
        dist.barrier(dist.new_group(backend='gloo', timeout=timedelta(days=7)))

def stop_processes():
    if dist.is_initialized():
        dist.destroy_process_group()

def fill_up(x, rows):
    """x (B, ...) with its first row again and again, (rows, ...), in the memory order that x has."""
    filler = x[:1].detach().expand(rows - len(x), *x.shape[1:])
    filled = torch.cat([x, filler])  # which forgets the order channels-last
    return filled.to(memory_format=torch.channels_last_3d) if x.ndim == 5 and x.stride(1) == 1 else filled

def compile_whole(net):
    """Compile what a network does. net.compile() would leave a subclass of nn.Sequential as it is."""
    net.forward = torch.compile(net.forward, dynamic=False)

def compile_for(net, sizes, backend='inductor'):
    """Compile a network's training pass for a few numbers of volumes; batches between them are filled up.

    So sessions that lack scans make no graphs of their own, of which there may be eight. Rows must not depend
    on one another. Slices come as they are. In evaluation mode nothing is compiled.
    """
    eager = net.forward
    compiled = torch.compile(eager, dynamic=False, backend=backend)

    def forward(x, *args):
        if not net.training: return eager(x, *args)
        n = len(x)
        rows = min((size for size in sizes if size >= n), default=n)
        if rows == n or 1 in x.shape[2:]: return compiled(x, *args)
        x, args = tree_map(functools.partial(fill_up, rows=rows), (x, args))
        return compiled(x, *args)[:n]

    net.forward = forward

def explain_failures(savers):
    """From now on, two errors end the program with one line: too little GPU memory, and a lost process.

    savers: the settings that lower the memory, as text.
    """
    usual_hook = sys.excepthook
    signs = ('Connection closed by peer', 'Connection reset', 'Broken pipe', 'Socket', 'NCCL',
             'remote process')

    def hook(kind, error, trace):
        if issubclass(kind, torch.OutOfMemoryError):
            peak = 'not known'
            if torch.cuda.is_available():
                peak = f'{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB'
            print(f'out of GPU memory, peak {peak}: lower {savers}', file=sys.stderr)
        elif dist.is_initialized() and any(sign in str(error) for sign in signs):
            reason = str(error).strip().splitlines()[0]
            print(f'process {dist.get_rank()}: another process is gone ({reason}); its own message says why',
                  file=sys.stderr)
        else:
            usual_hook(kind, error, trace)

    sys.excepthook = hook

def catch_signals():
    """From now on SIGINT and SIGTERM only note their number.

    returns stop_signal(), which says which one came, 0 for none. It gives every process the same answer,
    since a signal may reach one of them only, or each at another step.
    """
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))

    def stop_signal():
        first = received[0] if received else 0
        if not dist.is_initialized(): return first
        number = torch.tensor(first)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    return stop_signal

def end_by_signal(number, it):
    """SystemExit as the shell knows it, after a line that says how to go on."""
    print0(f'stopped by signal {number} after iteration {it}; go on with --init_from=resume')
    stop_processes()
    raise SystemExit(128 + number)

def print0(*args):
    """Print on the first process only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*args, flush=True)

def mean_over_processes(x):
    """Replace a tensor by its mean over the processes."""
    if not dist.is_initialized(): return
    dist.all_reduce(x)
    x /= dist.get_world_size()

def autocast(device, dtype):
    """Context for mixed precision; dtype 'bfloat16' or 'float32' (no autocast)."""
    if dtype not in ('bfloat16', 'float32'):
        raise SystemExit(f'--dtype={dtype}: bfloat16 or float32')
    if dtype == 'float32': return nullcontext()
    return torch.autocast(device.split(':')[0], dtype=torch.bfloat16)

def peak_flops(device):
    """Dense bf16 peak of the card in FLOP/s by its data sheet, 0 where it is not known."""
    if not device.startswith('cuda'): return 0.0
    peaks = {'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'A100': 312e12,
             'L40S': 362e12, 'A40': 150e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12, 'A6000': 155e12}
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in peaks.items() if re.search(rf'\b{card}\b', name)), 0.0)

# ---------------------------------------------------------------- weights and checkpoints

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

def save_weights(path, weights, about):
    """Weights {name: tensor} and the dict of what they are, as .pt or, with a .json beside, .safetensors."""
    if not path.endswith('.safetensors'):
        return save_checkpoint(path, about | {'model': weights, 'ema': None})
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    safetensors_of(path).save_file(weights, path)
    write_text(path.replace('.safetensors', '.json'), json.dumps(about, indent=1) + '\n')

def load_weights(path, device):
    """What save_weights wrote as .safetensors."""
    with open(path.replace('.safetensors', '.json')) as f:
        about = as_tuples(json.load(f))
    return about | {'model': safetensors_of(path).load_file(path, device), 'ema': None}

def as_tuples(tree):
    """A tree of JSON with tuples for lists."""
    if isinstance(tree, list): return tuple(map(as_tuples, tree))
    if isinstance(tree, dict): return {key: as_tuples(value) for key, value in tree.items()}
    return tree

def safetensors_of(path):
    try:
        import safetensors.torch
    except ImportError:
        raise SystemExit(f'{path}: pip install safetensors for this format, or use .pt')
    return safetensors.torch

def load_checkpoint(path, device='cpu'):
    """A checkpoint of a training script as a dict; anything else ends the program with one line."""
    path = str(path)
    if not os.path.isfile(path): raise SystemExit(f'{path}: no such checkpoint')
    try:
        if path.endswith('.safetensors'):
            checkpoint = load_weights(path, device)
        else:
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:
        raise SystemExit(f'{path}: not a readable checkpoint ({type(e).__name__}); was the file cut short?')
    if not isinstance(checkpoint, dict) or 'model_args' not in checkpoint:
        raise SystemExit(f'{path}: not a checkpoint of this project (it has no model_args)')
    return checkpoint

def load_like(path, args):
    """The checkpoint at `path`. SystemExit with one line if its model differs from that of args."""
    checkpoint = load_checkpoint(path)
    differences = changes(checkpoint['model_args'], args)
    if differences: raise SystemExit(f'{path}: checkpoint of another model: {differences}')
    return checkpoint

def changes(old, new):
    """The keys of two dicts whose values differ, with both values, as text; '' where all are equal."""
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    return '; '.join(f'{key} {old.get(key)!r} there, {new.get(key)!r} here' for key in keys)

# ---------------------------------------------------------------- output folder and log

def make_out_dir(path):
    """Create the folder and prove that it can be written; one line and exit otherwise."""
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f'.probe{os.getpid()}')
        open(probe, 'w').close()
        os.remove(probe)
    except OSError as e:
        raise SystemExit(f'{path}: cannot write there ({e.strerror}); choose another --out_dir')

def refuse_overwriting(out_dir, init_from, overwrite):
    """SystemExit with what to do if a new run would take the place of one that out_dir holds."""
    checkpoint = os.path.join(out_dir, 'ckpt.pt')
    if init_from != 'resume' and not overwrite and os.path.exists(checkpoint):
        raise SystemExit(f'{checkpoint}: a run is there; go on with --init_from=resume, choose another '
                         '--out_dir, or add --overwrite=True')

def write_text(path, text):
    """Write a small text file whole or not at all."""
    part = f'{path}.{os.getpid()}.part'  # jobs of an array may write the same file
    with open(part, 'w') as f:
        f.write(text)
    os.replace(part, path)

def markdown_table(head, rows):
    """Lines of a markdown table; rows are lists of what is to be printed, as many as head has columns."""
    return ['| ' + ' | '.join(map(str, line)) + ' |' for line in (head, ['---'] * len(head), *rows)]

def read_log(out_dir):
    """Whole lines of out_dir/log.jsonl; a last one that a kill cut short is left out."""
    try:
        with open(os.path.join(out_dir, 'log.jsonl')) as f:
            return [line for line in f if line.endswith('}\n')]
    except FileNotFoundError:
        return []

def log_until(out_dir, it, validated):
    """Lines of log.jsonl up to iteration `it`; that of a validation at `it` only if validated."""
    kept = []
    for line in read_log(out_dir):
        record = json.loads(line)
        is_validation = any(key.startswith('val/') for key in record)
        if record['iter'] < it or record['iter'] == it and (validated or not is_validation):
            kept.append(line)
    return kept

def duration(seconds):
    """Such as 40 s, 12 min or 3 h 20 min."""
    if seconds < 90: return f'{seconds:.0f} s'
    minutes = round(seconds / 60)
    return f'{minutes} min' if minutes < 90 else f'{minutes // 60} h {minutes % 60:02d} min'

class StepLog:
    """The bookkeeping of a training loop: clocks, counters, the line of a step, the records of log.jsonl.

    out_dir gets config.py, the settings, and log.jsonl, a JSON line per record. Records after iteration `it`
    are dropped first, since those steps will be taken again; that of a validation at `it` too, unless
    validated. Only the first process writes. interval: steps between lines. total: iterations of the whole
    run. wandb_project: also sends records to wandb if it is not ''. config's tensorboard also writes them for
    it, to out_dir/tensorboard.
    """
    def __init__(self, out_dir, config, wandb_project, interval, it, total, device, world, validated=True):
        self.out_dir, self.interval, self.device, self.world = out_dir, interval, device, world
        self.total = total
        self.first_it = it + 1
        self.recent = []  # of steps whose values nobody has looked at: a look waits for the GPU
        self.writes = not dist.is_initialized() or dist.get_rank() == 0
        self.wandb, self.board = None, None
        if self.writes:
            git_commit()  # that of the start: the source may change while the run goes on
            settings = ''.join(f'{key} = {value!r}\n' for key, value in config.items())
            write_text(os.path.join(out_dir, 'config.py'), settings)
            write_text(os.path.join(out_dir, 'log.jsonl'), ''.join(log_until(out_dir, it, validated)))
            if wandb_project:
                self.wandb = start_wandb(wandb_project, out_dir, config)
            if config.get('tensorboard'):
                self.board = start_tensorboard(out_dir, it)
        self.restart(it)

    def restart(self, it):
        """Begin to count after iteration `it`: what a validation takes is the time of no step."""
        self.counted_from, self.clock = it, time.perf_counter()
        self.waited = self.flops = 0.0
        self.counts = {}

    def next_batch(self, batches):
        """The next batch of an iterator; the time spent waiting for it is counted."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def count(self, what, n, flops):
        """Count n volumes, slices or latents of this process, and the FLOP of their training step."""
        self.counts[what] = self.counts.get(what, 0) + n
        self.flops += flops

    def note(self, it, values, files):
        """Remember a step's values {name: scalar tensor}, and the files of its batch, for check()."""
        self.recent.append((it, list(values), torch.stack(list(values.values())), files))

    def due(self, it):
        """Whether iteration `it` gets a line: every interval-th, and the first one of this process."""
        return it % self.interval == 0 or it == self.first_it

    def check(self):
        """SystemExit at the first noted value that is not finite."""
        for it, names, values, files in self.recent:
            for name, value in zip(names, values.tolist()):
                if not math.isfinite(value):
                    raise SystemExit(f'iteration {it}: {name} is {value}; the batch of this process was '
                                     f'{", ".join(files)}; ckpt.pt holds the last good state')
        self.recent.clear()

    def step(self, it, terms, grad_norm, lr):
        """Print and record a step: means over the processes of its terms {name: scalar tensor} and grad_norm.

        A record has train/<term>, train/grad_norm, lr; ms per step; volumes (or slices, latents) per second
        of all processes; data_wait, the share of the time spent waiting; on a GPU mfu and peak_gib.
        """
        values = torch.stack([*terms.values(), grad_norm])
        mean_over_processes(values)
        *values, grad_norm = values.tolist()
        seconds, steps = time.perf_counter() - self.clock, it - self.counted_from
        record = {'iter': it, **{f'train/{name}': value for name, value in zip(terms, values)}}
        record |= {'train/grad_norm': grad_norm, 'lr': lr, 'ms': 1000 * seconds / steps}
        record |= {f'{what}_per_s': self.world * n / seconds for what, n in self.counts.items()}
        record['data_wait'] = self.waited / seconds
        if peak_flops(self.device):
            record['mfu'] = self.flops / seconds / peak_flops(self.device)
        if self.device.startswith('cuda'):
            record['peak_gib'] = torch.cuda.max_memory_allocated() / 2 ** 30
        if it % self.interval == 0 or it == 1:  # the first line after a resume is for the screen only
            self.write(record)
        line = [f'{name} {value:.4f}' for name, value in zip(terms, values)]
        line += [f'grad {grad_norm:.2f}', f'lr {lr:.1e}', f"{record['ms']:.0f} ms"]
        line += [f"{record[f'{what}_per_s']:.1f} {what}/s" for what in self.counts]
        line.append(f"wait {record['data_wait']:.0%}")
        if 'mfu' in record:
            line.append(f"mfu {record['mfu']:.0%}")
        if 'peak_gib' in record:
            line.append(f"{record['peak_gib']:.1f} GiB")
        line.append(f"{duration((self.total - it) * seconds / steps)} left")
        print0(f'iter {it:,}/{self.total:,}: ' + ' | '.join(line))
        self.restart(it)

    def tabulate(self):
        """Write log.csv, the same as log.jsonl for a spreadsheet, and return the records."""
        records = [json.loads(line) for line in read_log(self.out_dir)]
        columns = list(dict.fromkeys(key for record in records for key in record))
        with open(os.path.join(self.out_dir, 'log.csv'), 'w', newline='') as f:
            table = csv.DictWriter(f, columns)
            table.writeheader()
            table.writerows(records)
        return records

    def write(self, record):
        """Append a record, a dict of numbers with 'iter', to log.jsonl; what is not finite becomes null."""
        if not self.writes: return
        clean = {}
        for key, value in record.items():
            clean[key] = None if isinstance(value, float) and not math.isfinite(value) else value
        with open(os.path.join(self.out_dir, 'log.jsonl'), 'a') as f:
            f.write(json.dumps(clean) + '\n')
        if self.wandb:
            self.wandb.log(record, step=record['iter'])
        if self.board:
            for key in record.keys() - {'iter'}:
                self.board.add_scalar(key, record[key], record['iter'])
            self.board.flush()

def start_wandb(project, out_dir, config):
    try:
        import wandb
    except ImportError:
        raise SystemExit('--wandb_project needs wandb: pip install wandb, or leave it empty')
    wandb.init(project=project, name=os.path.basename(out_dir), config=config)
    return wandb

def start_tensorboard(out_dir, it):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SystemExit('--tensorboard=True needs tensorboard: pip install tensorboard, or leave it off')
    return SummaryWriter(os.path.join(out_dir, 'tensorboard'), purge_step=it + 1)  # those come again

@functools.cache
def git_commit():
    """Short commit of the source when first asked, with + if it was edited; '' outside a repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ['git', 'describe', '--always', '--dirty=+', '--exclude=*']
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ''
