"""Writes what follows from the studies' results: cards, docs/verdicts.md, reports, verdicts.

Usage: python tools/verdicts.py [ID ...]          (a test says when it is due)

It reads experiments/*/results/analysis.json and facts.json, and effjax/methods.toml. Of the latter
it sets the verdicts of the methods that a study measured. An ID makes the card of a method that
has none.
"""

import pathlib
import sys
from collections.abc import Sequence

from effjax.core.command import run_command
from effjax.study import card, facts, markdown

ROOT = pathlib.Path(__file__).resolve().parents[1]


def pages(new: Sequence[str] = (), root: pathlib.Path = ROOT) -> dict[pathlib.Path, str]:
    """Returns path -> text of everything that is made.

    Args:
      new: methods to make a card for, beside those that have one or were measured.
      root: of the repository.
    """
    catalogue, folder = root / 'effjax' / 'methods.toml', root / 'docs' / 'methods'
    methods, studies = card.catalogue(catalogue), card.stored(root)
    card.check(methods, studies)
    also = facts.stored(root, methods)
    verdicts = {name: card.verdict(name, studies, methods) for name in methods}
    wanted = {f.stem for f in folder.glob('*.md')} - {'README'} | set(new)
    wanted |= {name for name in methods if card.measured(name, studies)} | set(also)
    cards = {}
    for name in sorted(wanted, key=[*methods, *sorted(wanted)].index):
        file = folder / f'{name}.md'
        text = file.read_text(encoding='utf-8') if file.is_file() else ''
        cards[name] = card.render(name, studies, text, methods, also.get(name, ()))
    index = folder / 'README.md'
    titles = {name: card.title(text) for name, text in cards.items()}
    return {
        catalogue: card.with_verdicts(catalogue.read_text(encoding='utf-8'), verdicts),
        **{folder / f'{name}.md': text for name, text in cards.items()},
        index: card.index(titles, verdicts, index.read_text(encoding='utf-8')),
        root / 'docs' / 'verdicts.md': card.verdicts_page(studies, methods, list(cards)),
        **{root / at / card.REPORT: markdown.render(study) for at, study in studies.items()},
    }


def main(argv: Sequence[str]) -> None:
    """Writes the pages that changed and prints their names."""
    for path, text in pages(argv).items():
        if not path.is_file() or path.read_text(encoding='utf-8') != text:
            path.write_text(text, encoding='utf-8')
            print(path.relative_to(ROOT))


if __name__ == '__main__':
    sys.exit(run_command(main, sys.argv[1:]))
