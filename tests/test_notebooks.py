"""Notebooks run from their first cell to their last, as a reader would run them."""

import os

import pytest

NOTEBOOKS = ('growth',)


# Minutes on idle cores; how long others make it wait is no fault of it.
@pytest.mark.timeout(900)
@pytest.mark.ci
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_it_runs(name, repository, monkeypatch):
    if not os.environ.get('EFFJAX_NEED_NOTEBOOKS'):
        pytest.importorskip('nbclient', reason='needs nbclient, of the extra [notebooks]')
    import nbclient
    import nbformat

    monkeypatch.chdir(repository / 'notebooks')
    monkeypatch.setenv('PYTHONPATH', str(repository))
    monkeypatch.delenv('MPLBACKEND', raising=False)
    # As tests: its models are small, so that compiling them is what takes time.
    monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    notebook = nbformat.read(repository / 'notebooks' / f'{name}.ipynb', as_version=4)
    assert not any(cell.get('outputs') for cell in notebook.cells)  # kept without
    nbclient.NotebookClient(notebook, timeout=800, kernel_name='python3').execute()
    printed = ''.join(
        output.get('text', '') for cell in notebook.cells for output in cell.get('outputs', ())
    )
    assert 'grown by stack' in printed and 'stack ' in printed and 'whole' in printed
    assert any(
        'image/png' in output.get('data', {})
        for cell in notebook.cells
        for output in cell.get('outputs', ())
    )


def test_every_notebook_is_run(repository):
    assert {file.stem for file in (repository / 'notebooks').glob('*.ipynb')} == set(NOTEBOOKS)
