"""What all tests share: the tiers, their time limits, CPU devices, the cache and the shared data.

A test's tier is its marker: none (`single`), `mesh`, `ci`, `process` or `slow`. `--tier=NAME` runs
exactly one tier and says what it left out; without it everything collected runs, except tests
marked `mesh` in a process that has not 8 simulated devices.
"""

import contextlib
import gc
import os
import pathlib
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Later ones win where a test has several: a `mesh` test marked `slow` is in the tier `slow`.
TIERS = ('single', 'mesh', 'ci', 'process', 'slow')
# Seconds a test may take. CI machines are allowed the longer one for every tier.
LIMITS = {'single': 60, 'mesh': 60, 'ci': 180, 'process': 180, 'slow': 0}
MESH_DEVICES = 8
_DEVICE_FLAG = '--xla_force_host_platform_device_count'
# `process` and `slow` train for longer, and as XLA compiles for a user; so do tests of `ci` that
# take the fixture `full_compile`.
UNOPTIMISED = ('single', 'mesh', 'ci')

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Tokenizers and packed records made by one test serve the others: keyed by content, never stale.
os.environ.setdefault('EFFJAX_CACHE', str(ROOT / '.cache' / 'tests'))
# Many tests run the same small programs: each is compiled once, whatever process needs it.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'xla'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
# BLAS and XLA already use both cores of a small machine; more threads only fight.
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
# But the interpreter of GPU kernels lets each simulated warpgroup wait in a thread of XLA's pool,
# which has one a core: with fewer than warpgroups, they wait forever.
os.environ.setdefault('NPROC', '8')


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--tier', choices=TIERS, help='run exactly the tests of one tier')


def pytest_configure(config: pytest.Config) -> None:
    tier = config.getoption('tier')
    if tier and os.environ['JAX_PLATFORMS'] != 'cpu':
        raise pytest.UsageError(f'--tier={tier} runs on the CPU; unset JAX_PLATFORMS.')
    # Compiling is most of what these take, and LLVM's passes are half of compiling a large program.
    # Without them it is the same HLO (what is fused, partitioned and kept in memory) and the same
    # sums, in slower machine code, which hardly runs. JAX_DISABLE_MOST_OPTIMIZATIONS=0 undoes it.
    if tier in UNOPTIMISED:
        os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    if tier == 'mesh' and simulated_devices() != MESH_DEVICES:
        flags = re.sub(rf'{_DEVICE_FLAG}=\d+', '', os.environ.get('XLA_FLAGS', ''))
        os.environ['XLA_FLAGS'] = f'{flags} {_DEVICE_FLAG}={MESH_DEVICES}'.strip()


def simulated_devices() -> int:
    """Returns how many CPU devices XLA_FLAGS asks for."""
    found = re.findall(rf'{_DEVICE_FLAG}=(\d+)', os.environ.get('XLA_FLAGS', ''))
    return int(found[-1]) if found else 1


def tier_of(item: pytest.Item) -> str:
    """Returns the tier of a test: the last of its markers in the order of `TIERS`."""
    return next((t for t in reversed(TIERS) if item.get_closest_marker(t)), 'single')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption('tier')
    kept, left_out = [], []
    for item in items:
        tier = tier_of(item)
        runs = tier == wanted if wanted else tier != 'mesh' or simulated_devices() == MESH_DEVICES
        (kept if runs else left_out).append(item)
        limit = max(LIMITS.values()) if os.environ.get('CI') and LIMITS[tier] else LIMITS[tier]
        if config.getoption('timeout', None) is None and not item.get_closest_marker('timeout'):
            item.add_marker(pytest.mark.timeout(limit))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    config.stash[_LEFT_OUT] = Counter(map(tier_of, left_out))
    items[:] = kept


_LEFT_OUT = pytest.StashKey[Counter]()


def pytest_collection_finish() -> None:
    """What is imported and collected stays: the garbage collector need not walk it each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, 'workeroutput', None)
    if output is not None:  # a worker of xdist tells the process that prints the summary
        output['left_out'] = dict(session.config.stash.get(_LEFT_OUT, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    left_out = getattr(node, 'workeroutput', {}).get('left_out', {})
    node.config.stash[_LEFT_OUT] = Counter(left_out)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    left_out = config.stash.get(_LEFT_OUT, Counter())
    if not left_out:
        return
    counts = ', '.join(f'{left_out[t]} {t}' for t in TIERS if left_out[t])
    terminalreporter.write_line(
        f'Left out: {counts}. Run a tier with: python -m pytest --tier=NAME ({", ".join(TIERS)}).'
    )


@pytest.fixture(scope='session', autouse=True)
def _on_cpu() -> None:
    """A tier measured on another device would prove nothing about the tolerances written here."""
    if os.environ['JAX_PLATFORMS'] == 'cpu':
        import jax

        assert jax.default_backend() == 'cpu'


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Libraries that draw from the global generators draw the same in every order of tests."""
    import numpy as np

    random.seed(0)
    np.random.seed(0)


@contextlib.contextmanager
def _compiled_quickly(quickly: bool) -> Iterator[None]:
    import jax

    before = jax.config.values['jax_disable_most_optimizations']
    jax.config.update('jax_disable_most_optimizations', quickly)
    yield
    jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture
def quick_compile() -> Iterator[None]:
    """Compiles without LLVM's passes whatever the tier, also where none is named."""
    with _compiled_quickly(True):
        yield


@pytest.fixture
def full_compile() -> Iterator[None]:
    """Compiles as for a user: for what runs for long, and for what is compiled for a chip."""
    with _compiled_quickly(False):
        yield


@pytest.fixture(scope='session')
def repository() -> pathlib.Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
    """Folder of data sets that are not in the repository: tinyshakespeare, fashion-mnist, ..."""
    folder = pathlib.Path(os.environ.get('EFFJAX_SHARED_DATA', ROOT.parent / 'shared' / 'data'))
    if not folder.is_dir():
        pytest.skip('no folder of shared data; name it with EFFJAX_SHARED_DATA')
    return folder


@pytest.fixture(scope='session')
def words(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of 60 small documents of words with some order to learn."""
    folder = tmp_path_factory.mktemp('words')
    draw = random.Random(0)
    subjects, verbs, things = 'cat dog bird', 'sees likes finds', 'food water home'
    for i in range(60):
        lines = [
            f'the {draw.choice(subjects.split())} {draw.choice(verbs.split())} '
            f'{draw.choice(things.split())}.'
            for _ in range(draw.randint(3, 12))
        ]
        (folder / f'{i:02d}.txt').write_text('\n'.join(lines))
    return folder


@pytest.fixture
def tiny(words: pathlib.Path):
    """Returns `make(*overrides, **changes) -> config` of a model that trains in a moment."""
    from effjax.core import config as config_lib

    def make(*overrides: str, **changes):
        config = config_lib.defaults()
        config.update(
            name='tiny',
            steps=6,
            batch_size=8,
            seq_len=32,
            data={'kind': 'text', 'path': str(words), 'tokenizer': {'kind': 'byte'}},
            model={
                'kind': 'decoder',
                'width': 16,
                'layers': 2,
                'mixer': {'kind': 'attention', 'heads': 2},
                'ffn': {'kind': 'swiglu', 'hidden': 32},
            },
            schedule={'kind': 'linear', 'peak': 1e-2, 'warmup': 0.1},
            precision={'kind': 'fp32'},
            evals={'valid': {}},
        )
        config.log.progress = False
        config.log.tensorboard = False
        config.update(changes)
        return config_lib.finish(config, overrides)

    return make


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch):
    """Returns `stop_after(step)`: sends this process a signal, once, when its metrics arrive."""
    from effjax.training.loop import Trainer

    record, wanted = Trainer._record, []

    def wrapped(self, flight, *args):
        record(self, flight, *args)
        if wanted and flight.row['step'] == wanted[0]:
            wanted.clear()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, '_record', wrapped)
    return wanted.append
