"""Checkpoints: what is saved comes back bit by bit, or is refused with a reason."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core.errors import CheckpointError
from effjax.training import checksums
from effjax.training.checkpoints import Checkpointer, read_manifest

MANIFEST = {'stage': 0, 'digest': 'abc'}


def make_state(step: int, width: int = 8) -> dict:
    """Returns a small train state whose values depend on the step."""
    keys = jax.random.split(jax.random.key(step), 2)
    params = {
        'body': {'w': jax.random.normal(keys[0], (4, width))},
        'head': jax.random.normal(keys[1], (width,), jnp.bfloat16),
    }
    return {
        'params': params,
        'buffers': {},
        'optimizer': optax.adamw(1e-3).init(params),
        'loss_scale': {},
        'step': jnp.int32(step),
    }


def abstract(state: dict) -> dict:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(folder, *steps, keep=2, **kw) -> None:
    checkpointer = Checkpointer(folder, keep=keep)
    for step in steps:
        checkpointer.save(step, make_state(step, **kw), manifest=MANIFEST, extra={'at': step})
    checkpointer.close()


def restore(folder, **kw):
    return Checkpointer(folder).restore(abstract(make_state(0)), **kw)


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """A folder with valid checkpoints of steps 10 and 20; copied by tests that damage it."""
    folder = tmp_path_factory.mktemp('two') / 'checkpoints'
    save(folder, 10, 20)
    return folder


@pytest.fixture
def copy(two, tmp_path):
    return shutil.copytree(two, tmp_path / 'checkpoints')


def test_round_trip_is_bit_exact(two):
    restored = restore(two)
    assert (restored.step, restored.skipped, restored.extra) == (20, [], {'at': 20})
    assert restored.manifest['digest'] == 'abc' and restored.manifest['step'] == 20
    assert_same(restored.state, make_state(20))


@pytest.mark.parametrize(
    'tx',
    [
        optax.adafactor(1e-3),
        optax.sgd(0.1),
        optax.masked(optax.adam(1e-3), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        optax.contrib.muon(1e-3),
        optax.contrib.schedule_free_adamw(1e-3),
    ],
    ids=['adafactor', 'sgd', 'masked', 'muon', 'schedule_free'],
)
def test_optax_states_keep_their_types(tx, tmp_path):
    state = make_state(1)
    state['optimizer'] = tx.init(state['params'])
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state, manifest={}, extra={}, block=True)
    assert_same(checkpointer.restore(abstract(state)).state, state)
    checkpointer.close()


def test_donated_arrays_are_saved_as_they_were(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = step({f'w{i}': jnp.zeros((1 << 18,)) for i in range(8)})
    shapes = abstract(state)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state, manifest={}, extra={})
    for _ in range(10):
        state = step(state)
    jax.block_until_ready(state)
    found = checkpointer.restore(shapes).state
    assert all(np.all(np.asarray(x) == 1.0) for x in found.values())
    checkpointer.close()


def test_abstract_state_may_depend_on_the_manifest(two):
    seen = []

    def build(manifest):
        seen.append(manifest['stage'])
        return abstract(make_state(0))

    assert_same(Checkpointer(two).restore(build).state, make_state(20))
    assert seen == [0]


def test_older_step_on_request(two):
    assert_same(restore(two, step=10).state, make_state(10))
    with pytest.raises(CheckpointError, match=r'no valid checkpoint of step 15 in .*it has 10, 20'):
        restore(two, step=15)


def test_manifest_alone(two, tmp_path):
    assert read_manifest(two)['step'] == 20
    assert read_manifest(two, 10)['state']['params/body/w'] == [[4, 8], 'float32']
    with pytest.raises(CheckpointError, match=r'no valid checkpoint in .*give a folder'):
        read_manifest(tmp_path)


def test_nothing_is_there(tmp_path):
    checkpointer = Checkpointer(tmp_path / 'none')
    assert checkpointer.latest() is None and checkpointer.steps() == []
    with pytest.raises(CheckpointError, match='nothing is there'):
        checkpointer.restore(abstract(make_state(0)))
    checkpointer.close()
    assert not (tmp_path / 'none').exists()


# ---- another model ---------------------------------------------------------------------------


def test_other_shapes_are_named(two):
    with pytest.raises(CheckpointError) as e:
        Checkpointer(two).restore(abstract(make_state(0, width=16)))
    text = str(e.value)
    assert 'params/body/w is (4, 8), expected (4, 16); params/head is (8,)' in text
    assert '(and 2 more)' in text or '(and 1 more)' in text
    assert 'choose another --workdir' in text


def test_check_is_asked_before_arrays_are_compared(two):
    def check(manifest):
        raise CheckpointError(f'digest {manifest["digest"]} is not ours')

    with pytest.raises(CheckpointError, match='digest abc is not ours'):
        Checkpointer(two).restore(abstract(make_state(0, width=16)), check=check)


# ---- damage ----------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def delete(path):
    path.unlink()


@pytest.mark.parametrize('damage', [flip, truncate, delete])
def test_damage_in_any_file_is_reported_and_the_one_before_used(damage, copy):
    newest = copy / '20'
    files = sorted(p.relative_to(newest) for p in newest.rglob('*') if p.is_file())
    assert len(files) > 10
    for name in files:
        before = (newest / name).read_bytes()
        damage(newest / name)
        restored = restore(copy)
        assert restored.step == restored.extra['at'] == 10, name
        assert len(restored.skipped) == 1
        assert restored.skipped[0].startswith(f'step 20: {name.as_posix()}')
        (newest / name).write_bytes(before)
    assert restore(copy).step == 20


def test_every_byte_of_the_list_of_checksums_counts(copy):
    path = copy / '20' / checksums.FILE
    content = path.read_bytes()
    for i in range(0, len(content), 7):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        assert checksums.problem(copy / '20') == 'checksums.json is damaged', i


def test_damaged_newest_is_skipped_then_set_aside(copy):
    flip(copy / '20' / 'state' / '_METADATA')
    checkpointer = Checkpointer(copy, keep=1)
    restored = checkpointer.restore(abstract(make_state(0)))
    assert restored.skipped == ['step 20: state/_METADATA: its checksum differs']
    assert_same(restored.state, make_state(10))
    assert (copy / '20').exists()  # reading changes nothing
    checkpointer.save(15, make_state(15), manifest=MANIFEST, extra={})
    checkpointer.save(20, make_state(20), manifest=MANIFEST, extra={}, block=True)
    checkpointer.close()
    assert sorted(p.name for p in copy.iterdir()) == ['20', '20.damaged']
    assert_same(restore(copy).state, make_state(20))


def test_all_damaged(copy):
    flip(copy / '20' / 'manifest' / 'metadata')
    shutil.rmtree(copy / '10' / 'state')
    checkpointer = Checkpointer(copy)
    assert checkpointer.latest() == 20  # a run must not quietly start from nothing
    with pytest.raises(CheckpointError) as e:
        checkpointer.restore(abstract(make_state(0)))
    assert str(copy) in str(e.value)
    assert 'step 20: manifest/metadata: its checksum differs; step 10: state/' in str(e.value)
    assert 'start again with another --workdir' in str(e.value)


def test_retention_never_prefers_a_damaged_one(copy):
    flip(copy / '20' / 'state' / '_METADATA')
    save(copy, 30)
    assert Checkpointer(copy).steps() == [10, 20, 30]  # 20 looks whole: its sizes are right
    save(copy, 40)
    assert Checkpointer(copy).steps() == [30, 40]


# ---- saving ----------------------------------------------------------------------------------


def test_keep_and_monotone_steps(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.steps() == [3, 4]
    checkpointer.save(4, make_state(99), manifest={}, extra={})  # already there: nothing to do
    with pytest.raises(CheckpointError, match=r'step 2 cannot be saved: .* already holds step 4'):
        checkpointer.save(2, make_state(2), manifest={}, extra={})
    checkpointer.close()
    assert_same(restore(tmp_path).state, make_state(4))


def test_killed_between_commit_and_checksums(copy):
    (copy / '20' / checksums.FILE).unlink()
    checkpointer = Checkpointer(copy)
    assert checkpointer.latest() == 10
    restored = checkpointer.restore(abstract(make_state(0)))
    assert restored.step == 10 and 'the save was interrupted' in restored.skipped[0]
    checkpointer.save(20, make_state(20), manifest={}, extra={}, block=True)
    assert checkpointer.steps() == [10, 20]
    checkpointer.close()


def test_leftovers_of_kills_are_cleared_and_damaged_ones_kept(copy):
    (copy / '5.deleting').mkdir()  # killed while deleting an old one
    (copy / '30.orbax-checkpoint-tmp').mkdir()  # killed while writing
    (copy / '20.damaged').mkdir()
    (copy / '20' / checksums.FILE).unlink()
    save(copy, 30)
    assert sorted(p.name for p in copy.iterdir()) == ['10', '20.damaged', '20.damaged2', '30']


class FileSizeLimit:
    """Makes writes beyond a size fail in this process, as a full disk does."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.old[1]))

    def __exit__(self, *exc_info):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.old)


# Writes that orbax gave up end after its event loop: storage code says so on stderr.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('background', [True, False])
def test_failed_write_leaves_the_last_good_one(tmp_path, background):
    width = 1 << 14  # random numbers that do not compress below the limit
    checkpointer = Checkpointer(tmp_path, background=background)
    state = make_state(1, width)
    checkpointer.save(1, state, manifest=MANIFEST, extra={}, block=True)
    message = r'checkpoint of step 2 could not be written to .*; the last good one is step 1'
    with FileSizeLimit(30_000), pytest.raises(CheckpointError, match=message):
        checkpointer.save(2, state, manifest=MANIFEST, extra={})
        checkpointer.wait()
    assert checkpointer.latest() == 1 and not (tmp_path / '2').exists()
    checkpointer.save(2, state, manifest=MANIFEST, extra={'again': True}, block=True)
    restored = checkpointer.restore(abstract(state))
    assert restored.step == 2 and restored.extra == {'again': True}
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2']  # nothing else takes room
    checkpointer.close()


def test_error_in_the_background_reaches_the_next_save(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checksums, 'write', _no_space)
        checkpointer.save(1, make_state(1), manifest={}, extra={})
        checkpointer._writer.join()
    with pytest.raises(
        CheckpointError, match=r'step 1 could not .*there is none before it.*No space'
    ):
        checkpointer.save(2, make_state(2), manifest={}, extra={})
    checkpointer.wait()  # the second save was started all the same
    assert checkpointer.steps() == [2]
    checkpointer.close()


def _no_space(folder):
    raise OSError(28, 'No space left on device')


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    checkpointer = Checkpointer(tmp_path / 'file')
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r'step 1 could not be written .*FileExistsError'):
            checkpointer.save(1, make_state(1), manifest={}, extra={})
    (tmp_path / 'file').unlink()
    checkpointer.save(1, make_state(1), manifest={}, extra={}, block=True)
    assert checkpointer.steps() == [1]
    checkpointer.close()


# ---- meshes and processes --------------------------------------------------------------------


@pytest.mark.mesh
def test_restores_on_other_meshes(tmp_path):
    def place(state, shape):
        devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
        mesh = jax.sharding.Mesh(devices, ('fsdp', 'tensor'))

        def sharding(x):
            names = ('fsdp', 'tensor') if x.ndim == 2 else ('fsdp',) * x.ndim
            return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))

        return jax.tree.map(lambda x: jax.device_put(x, sharding(x)), state)

    expected = make_state(3)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, place(expected, (4, 2)), manifest={}, extra={}, block=True)
    for shape in ((4, 2), (2, 2), (1, 1)):
        target = abstract(place(expected, shape))
        found = checkpointer.restore(target).state
        assert_same(found, expected)
        for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
            assert leaf.sharding == wanted.sharding
    checkpointer.close()


_SAVE_FOR_EVER = """
import sys
import jax, jax.numpy as jnp
from effjax.training.checkpoints import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
step = jax.jit(lambda s: {'w': s['w'] + 1.0})
state = {'w': jax.random.normal(jax.random.key(0), (1 << 21,))}
for i in range(1, 1000):
    state = step(state)
    checkpointer.save(i, state, manifest={}, extra={'mean': float(state['w'].mean())})
    print(i, flush=True)
"""


@pytest.mark.process
@pytest.mark.parametrize('delay', [0.0, 0.03, 0.1])
def test_kill_while_saving(tmp_path, delay):
    child = subprocess.Popen(
        [sys.executable, '-c', _SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    seen = 0
    while seen < 3:
        seen = int(child.stdout.readline())
    time.sleep(delay)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    shape = jax.ShapeDtypeStruct((1 << 21,), jnp.float32)
    checkpointer = Checkpointer(tmp_path)
    restored = checkpointer.restore({'w': shape})
    # Saves wait for the one before, so at most the one that was started last is missing.
    assert restored.step >= seen - 1
    assert float(restored.state['w'].mean()) == restored.extra['mean']
    following = restored.step + 1
    checkpointer.save(following, restored.state, manifest={}, extra={}, block=True)
    assert checkpointer.steps()[-1] == following
    assert not list(tmp_path.glob('*tmp*'))
    checkpointer.close()


_TWO_PROCESSES = """
import sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from effjax.core.errors import CheckpointError
from effjax.training import checkpoints, checksums
from effjax.training.signals import Agreement, agree

first = jax.process_index() == 0
assert agree(first) and not agree(False)
agreement = Agreement()
answers = [agreement(first and i >= 5) for i in range(30)]  # both stop at the same call
assert answers == sorted(answers) and answers[-1] and not answers[4]
print('stop at', answers.index(True), flush=True)

sharding = NamedSharding(Mesh(np.array(jax.devices()), 'data'), P('data'))
state = {'w': jax.jit(lambda: jax.numpy.arange(8.0), out_shardings=sharding)()}
target = {'w': jax.ShapeDtypeStruct((8,), 'float32', sharding=sharding)}
checkpointer = checkpoints.Checkpointer(sys.argv[1])
assert checkpointer.latest() is None
checkpointer.save(1, state, manifest={}, extra={'a': 1})
checkpointer.wait()

write = checksums.write
checksums.write = lambda folder: 1 / 0  # runs in process 0 only; both must learn of it
try:
    checkpointer.save(2, state, manifest={}, extra={}, block=True)
    raise SystemExit('no error')
except CheckpointError as e:
    assert ('ZeroDivisionError' if first else 'another process') in str(e), str(e)
checksums.write = write
checkpointer.save(2, state, manifest={}, extra={'a': 2}, block=True)
assert checkpointer.latest() == 2
restored = checkpointer.restore(target)
assert restored.step == 2 and restored.extra == {'a': 2}
for shard in restored.state['w'].addressable_shards:
    np.testing.assert_array_equal(np.asarray(shard.data), np.arange(8.0)[shard.index])
checkpointer.close()
print('done', flush=True)
"""


@pytest.mark.process
def test_two_processes(tmp_path, free_port):
    command = [sys.executable, '-c', _TWO_PROCESSES, str(tmp_path), f'localhost:{free_port}']
    children = [
        subprocess.Popen(
            [*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(2)
    ]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert all('done' in text for text in outputs), '\n'.join(outputs)
    stops = {line for text in outputs for line in text.splitlines() if 'stop at' in line}
    assert len(stops) == 1, stops
    # One process's checkpoint of two devices is read by one process with one device.
    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    found = Checkpointer(tmp_path).restore({'w': shape})
    np.testing.assert_array_equal(np.asarray(found.state['w']), np.arange(8.0))


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]
