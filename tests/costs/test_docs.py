"""The examples of docs/costs.md say what happens."""

import doctest


def test_examples(repository):
    path = repository / 'docs' / 'costs.md'
    result = doctest.testfile(str(path), module_relative=False)
    assert result.attempted > 20
    assert result.failed == 0
