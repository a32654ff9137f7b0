"""Tables of reference time: what they charge, what they do not cover, and what is refused."""

import dataclasses
import json
import math

import pytest

from effjax.core import config as config_lib
from effjax.core.errors import ConfigError
from effjax.costs import reference
from effjax.costs.reference import Entry, Table, reference_seconds, shape_of

CONDITIONS = {
    'device': 'Abacus 9000', 'backend': 'cpu', 'mesh': {}, 'sharding': {}, 'jax': '1', 'steps': 30,
    'xla_flags': '', 'effjax': '1', 'rounds': 2,
}  # fmt: skip


def config_of(*overrides, **model):
    """Returns a resolved config of a decoder, as plain dicts."""
    config = config_lib.defaults()
    config.steps, config.batch_size, config.seq_len = 10, 16, 128
    config.model = {
        'kind': 'decoder',
        'vocab_size': 512,
        'width': 64,
        'layers': 2,
        'mixer': {'kind': 'attention', 'heads': 4},
        'ffn': {'kind': 'swiglu'},
        **model,
    }
    return config_lib.as_dict(config_lib.finish(config, overrides))


def entry_of(seconds, *overrides, **model):
    return Entry(shape_of(config_of(*overrides, **model)), seconds, (seconds, seconds), 0.01)


def table_of(*entries, **conditions):
    return Table({**CONDITIONS, **conditions}, '2026-01-02', entries)


def write(path, table, **changes):
    path.write_text(json.dumps({**table.to_json(), **changes}))
    return path


def test_a_table_charges_the_steps_that_it_covers(tmp_path):
    table = table_of(entry_of(0.25), entry_of(0.5, 'model.layers=4'))
    path = write(tmp_path / 'table.json', table)
    assert Table.load(path).entries == table.entries
    assert reference_seconds(config_of(f'reference={path}', 'model.layers=4')) == 0.5
    assert reference_seconds(config_of()) is None


@pytest.mark.parametrize(
    'override',
    [
        'seed=7', 'steps=99', 'schedule.peak=0.5', 'optimizer.weight_decay=0.3', 'optimizer.b2=0.9',
        'data.path=x', 'clip_norm=0.5', 'model.init=lecun', 'model.dropout=0.0', 'mesh.fsdp=2',
        'model.embed_scale=2.0', 'optimizer.eps=1e-6', 'log.every_steps=5',
    ],
)  # fmt: skip
def test_what_leaves_the_time_as_it_is_is_no_part_of_a_shape(override):
    assert shape_of(config_of(override)) == shape_of(config_of())


@pytest.mark.parametrize(
    'override',
    [
        'model.layers=3', 'model.width=128', 'model.vocab_size=640', 'model.mixer.heads=2',
        'model.ffn.kind=gelu', 'model.tied=false', 'model.dropout=0.1', 'model.soft_cap=30.0',
        'batch_size=8', 'seq_len=64', 'accumulate=2', 'precision.kind=fp32', 'optimizer.kind=lion',
        'optimizer.mu_dtype=bfloat16', 'clip_norm=0', 'ema=0.9', 'execution.remat=full',
        'execution.layers=scan', 'execution.attention=xla', 'execution.loss_chunks=4',
        'data.packing=stream', 'task.z_loss=0.1', 'model.a_part_to_come=0.3',
    ],
)  # fmt: skip
def test_what_changes_the_step_is_part_of_its_shape(override):
    assert reference.key_of(shape_of(config_of(override))) != reference.key_of(
        shape_of(config_of())
    )


def test_a_shape_says_the_same_thing_in_one_way():
    assert shape_of(config_of('model.dropout=0.1')) == shape_of(config_of('model.dropout=0.4'))
    sgd = [shape_of(config_of('optimizer.kind=sgd', f'optimizer.momentum={m}')) for m in '01']
    assert sgd[0] != sgd[1] == shape_of(config_of('optimizer.kind=sgd'))
    assert shape_of(config_of('model.share=2')) == shape_of(config_of('model.share=2.0'))
    turned = dict(reversed(shape_of(config_of()).items()))
    assert reference.key_of(turned) == reference.key_of(shape_of(config_of()))


def test_images_have_no_row_length():
    vit = {'kind': 'vit', 'image_size': 8, 'classes': 10, 'patch': 2}
    shapes = [shape_of(config_of(f'seq_len={n}', **vit)) for n in (17, 256)]
    assert shapes[0] == shapes[1]


def test_a_shape_that_is_not_covered_is_refused_with_the_nearest():
    table = table_of(
        entry_of(0.1, 'optimizer.kind=lion', 'precision.kind=fp32'),
        entry_of(0.25),
        entry_of(1.0, 'model.layers=12'),
    )
    with pytest.raises(ConfigError) as error:
        table.seconds(config_of('model.layers=4'))
    assert str(error.value) == (
        'reference table (Abacus 9000) does not cover decoder of 4 layers, width 64, batch 16 x '
        '128, bf16, adamw; its nearest entries have model.layers 2 instead of 4 (0.25 s); '
        'model.layers 12 instead of 4 (1 s); add the step with python -m effjax.calibrate.'
    )
    with pytest.raises(ConfigError, match=r'instead of .*, 1 more \(0.1 s\)'):
        table_of(table.entries[0]).seconds(config_of('seq_len=64', 'batch_size=8'))


# ---- what is refused ---------------------------------------------------------------------------


def test_the_misplaced_digit_of_a_published_table_is_refused():
    """0.01052 for 0.1052 made a step of 7 layers look ten times cheaper (No Train No Gain)."""
    series = {5: 0.0786, 6: 0.09188, 7: 0.01052, 8: 0.1186, 9: 0.1320}
    with pytest.raises(ConfigError) as error:
        table_of(*(entry_of(s, f'model.layers={n}') for n, s in series.items())).check()
    assert str(error.value) == (
        'reference table is not monotone: decoder of 7 layers, width 64, batch 16 x 128, bf16, '
        'adamw takes 0.01052 s, less than the 0.09188 s of a smaller step (model.layers 6 instead '
        'of 7); measure both again.'
    )
    table_of(
        *(entry_of(0.1052 if n == 7 else s, f'model.layers={n}') for n, s in series.items())
    ).check()


SEGMENT = {'pattern': [{}, {'mixer': {'kind': 'attention', 'heads': 8}}], 'repeat': 2}


@pytest.mark.parametrize(
    ('small', 'large'),
    [
        (['model.width=64'], ['model.width=128']),
        (['seq_len=64'], ['seq_len=128']),
        (['batch_size=8'], ['batch_size=16']),
        (['model.ffn.hidden=128'], ['model.ffn.hidden=256']),
        (['model.layers=2', 'seq_len=64'], ['model.layers=4', 'seq_len=128']),
        # Heads of one width, as families of models have them.
        (['model.width=64', 'model.mixer.heads=4'], ['model.width=128', 'model.mixer.heads=8']),
        (
            ['model.width=64', 'model.mixer.heads=4', 'model.mixer.kv_heads=2'],
            ['model.width=128', 'model.mixer.heads=8', 'model.mixer.kv_heads=4'],
        ),
        (
            [f'model.segments=[{SEGMENT}]', 'model.layers=0'],
            [f'model.segments=[{ {**SEGMENT, "repeat": 3} }]', 'model.layers=0'],
        ),
    ],
)
def test_a_larger_step_is_never_faster(small, large):
    table_of(entry_of(0.2, *small), entry_of(0.196, *large)).check()  # within the tolerance
    table_of(entry_of(0.2, *large), entry_of(0.1, *small)).check()
    with pytest.raises(ConfigError, match='is not monotone'):
        table_of(entry_of(0.2, *small), entry_of(0.19, *large)).check()


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        (['model.layers=2'], ['model.layers=4', 'precision.kind=fp32']),
        (['model.layers=2', 'seq_len=128'], ['model.layers=4', 'seq_len=64']),
        (['model.mixer.heads=4'], ['model.mixer.heads=8']),
    ],
)
def test_steps_without_an_order_are_not_compared(one, other):
    table_of(entry_of(0.2, *one), entry_of(0.1, *other)).check()
    table_of(entry_of(0.1, *one), entry_of(0.2, *other)).check()


def test_repeats_must_agree_with_each_other_and_with_the_figure():
    good = entry_of(0.2)
    table_of(dataclasses.replace(good, repeats=(0.199, 0.204))).check()
    with pytest.raises(ConfigError, match=r'does not repeat within 3%: .* took 0.199, 0.206 s'):
        table_of(dataclasses.replace(good, repeats=(0.199, 0.206))).check()
    with pytest.raises(ConfigError, match=r'given as 0.02 s, but its repeats took 0.2, 0.2 s'):
        table_of(dataclasses.replace(good, seconds=0.02)).check()
    with pytest.raises(ConfigError, match='has two entries for decoder of 2 layers'):
        table_of(good, good).check()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'version': 2}, 'is of version 2, this effjax reads version 1'),
        ({'entries': []}, 'has no entries'),
        ({'entries': [3]}, 'entry 0 of reference table .* is not a block'),
        ({'entries': [{'model': {}}]}, "entry 0 of reference table .* has no 'task'"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, message):
    path = write(tmp_path / 'table.json', table_of(entry_of(0.2)), **changes)
    with pytest.raises(ConfigError, match=message):
        Table.load(path)


@pytest.mark.parametrize(
    'changes',
    [
        {'seconds': 0}, {'seconds': math.inf}, {'seconds': '0.2'}, {'seconds': True},
        {'repeats': [0.2]}, {'repeats': 0.2}, {'repeats': [0.2, None]}, {'repeats': [0.2, -0.2]},
    ],
)  # fmt: skip
def test_times_are_positive_numbers(tmp_path, changes):
    saved = {**entry_of(0.2).to_json(), **changes}
    path = write(tmp_path / 'table.json', table_of(entry_of(0.2)), entries=[saved])
    with pytest.raises(ConfigError, match='needs a positive number of seconds and at least two'):
        Table.load(path)


def test_blocks_of_an_entry_have_a_kind(tmp_path):
    saved = {**entry_of(0.2).to_json(), 'precision': 'bf16'}
    path = write(tmp_path / 'table.json', table_of(entry_of(0.2)), entries=[saved])
    with pytest.raises(ConfigError, match='model, task, precision, optimizer must be a block'):
        Table.load(path)


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / 'table.json'
    with pytest.raises(ConfigError, match='cannot read reference table .*: No such file'):
        Table.load(path)
    with pytest.raises(ConfigError, match='cannot read reference table .*: Is a directory'):
        Table.read(tmp_path)
    write(path, table_of(entry_of(0.2)))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ConfigError, match='is not a reference table, or was cut off'):
        reference_seconds(config_of(f'reference={path}'))
    path.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ConfigError, match='is not a reference table'):
        Table.load(path)
    saved = table_of(entry_of(0.2)).to_json()
    del saved['jax']
    path.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="has no 'jax'"):
        Table.load(path)


def test_a_table_that_changes_is_read_again(tmp_path):
    path = write(tmp_path / 'table.json', table_of(entry_of(0.2)))
    assert Table.load(path) is Table.load(path)
    write(path, table_of(entry_of(0.25)))
    assert Table.load(path).seconds(config_of()) == 0.25


def test_tables_of_one_device_are_merged():
    old = table_of(entry_of(0.2), entry_of(0.4, 'model.layers=4'))
    new = table_of(entry_of(0.5, 'model.layers=4'), entry_of(0.7, 'model.layers=6'))
    assert [e.seconds for e in old.merged(new).entries] == [0.2, 0.5, 0.7]
    for name, value in (('device', 'Abacus 1'), ('jax', '2'), ('mesh', {'data': 8}), ('steps', 9)):
        with pytest.raises(ConfigError, match=f'was measured with {name} .*write to another file'):
            old.merged(table_of(entry_of(0.1), **{name: value}))
