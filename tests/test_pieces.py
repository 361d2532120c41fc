"""What people copy: common.py's sections stand on those above, and single pieces run in an empty
file with what their docstring says they need.
"""

import ast
import inspect
import re

import numpy as np
import pytest
import torch

import common
import eval as evaluation
from conftest import ROOT
from test_scripts import SCRIPTS


def defined(node) -> list[str]:
    """Names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [name.id for target in node.targets for name in ast.walk(target) if is_name(name)]
    return []


def is_name(node) -> bool:
    return isinstance(node, ast.Name)


def used(node) -> set[str]:
    return {name.id for name in ast.walk(node) if is_name(name) and isinstance(name.ctx, ast.Load)}


def sections_of(source: str) -> list[int]:
    """The number of the section that each line of a file belongs to."""
    lines, number, numbers = source.split("\n"), 0, []
    for line, following in zip(lines, [*lines[1:], ""]):
        number += line.startswith("# ----") and following.startswith("# ")
        numbers.append(number)
    return numbers


def uses_of_later_sections(source: str) -> list[str]:
    tree, numbers = ast.parse(source), sections_of(source)
    place = {name: numbers[node.lineno - 1] for node in tree.body for name in defined(node)}
    return [
        f"line {node.lineno} uses {name}"
        for node in tree.body
        for name in used(node)
        if place.get(name, 0) > numbers[node.lineno - 1]
    ]


def test_each_section_of_common_uses_only_sections_above_it():
    source = (ROOT / "common.py").read_text()
    assert len(set(sections_of(source))) >= 15
    assert uses_of_later_sections(source) == []
    bar = "# " + "-" * 96
    wrong = (
        f"{bar}\n# A\n{bar}\ndef f():\n    return g()\n\n{bar}\n# B\n{bar}\ndef g():\n    pass\n"
    )
    assert uses_of_later_sections(wrong) == ["line 4 uses g"]  # that the test can fail


def pieces_of_a_file() -> dict:
    """(module, name) -> its top-level statement, of all root scripts."""
    return {
        (path.stem, name): node
        for path in ROOT.glob("*.py")
        for node in ast.parse(path.read_text()).body
        for name in defined(node)
    }


def all_it_needs(pieces: dict, start: tuple) -> set[tuple]:
    """The names of ours that a piece uses, and what these use."""
    found, todo = set(), [start]
    while todo:
        module, name = todo.pop()
        node = pieces[module, name]
        direct = {(module, other) for other in used(node)}
        direct |= {
            ("common", x.attr)
            for x in ast.walk(node)
            if isinstance(x, ast.Attribute) and getattr(x.value, "id", "") == "common"
        }
        new = (direct & set(pieces)) - found - {start}
        found |= new
        todo += new
    return found


def test_what_docstrings_say_a_copied_piece_needs_is_all_it_needs():
    pieces, seen = pieces_of_a_file(), 0
    for (module, name), node in pieces.items():
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        text = " ".join((ast.get_docstring(node) or "").split())
        found = re.search(r"Copied alone, needs ([\w, ]+?( of common\.py)?)\.", text)
        if found:
            seen += 1
            said = set(found[1].replace(" of common.py", "").split(", ")) - {"nothing else"}
            assert said == {n for _, n in all_it_needs(pieces, (module, name))}, (module, name)
    assert seen >= 20


def needs(piece) -> list[str]:
    """Names after "Copied alone, needs" in its docstring."""
    text = " ".join(inspect.getdoc(piece).split())
    found = re.search(r"Copied alone, needs ([\w, ]+)\.", text)[1]
    return [] if found == "nothing else" else found.split(", ")


def copied(module, names) -> dict:
    """The namespace of an empty file into which a module's imports and these pieces were copied."""
    source = inspect.getsource(module)
    parts = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            text = ast.get_source_segment(source, node)
            if not re.search(r"\bcommon\b", text):
                parts.append(text)
        elif set(defined(node)) & set(names):
            start = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
            parts.append("\n".join(source.split("\n")[start - 1 : node.end_lineno]))
    namespace = {"__name__": "copied"}
    exec("\n\n".join(parts), namespace)
    assert set(names) <= set(namespace)
    return namespace


def piece(module, name) -> tuple:
    """A piece copied into an empty file, and the same one in its module."""
    own = getattr(module, name)
    return copied(module, [name, *needs(own)])[name], own


def test_sparsemax_retrieval_and_average_precision_copied_alone():
    rng = np.random.default_rng(0)
    there, here = piece(common, "sparsemax")
    z = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(there(z), here(z)) and torch.allclose(there(z).sum(1), torch.ones(5))
    sim, owner = rng.normal(size=(8, 20)), rng.integers(0, 8, 20)
    ranks, ranks_here = (f(sim, owner) for f in piece(common, "retrieval_ranks"))
    scores, scores_here = piece(common, "retrieval_scores")
    assert scores(ranks) == scores_here(ranks_here)
    there, here = piece(common, "average_precision")
    values, targets = rng.normal(size=30), rng.random(30) > 0.6
    assert there(values, targets) == here(values, targets) > 0


def test_htsat_and_its_log_mel_copied_alone():
    names = [name for kind in ("HTSAT", "LogMel") for name in needs(getattr(common, kind))]
    there = copied(common, ["HTSAT", "LogMel", *names])
    waveform = torch.randn(2, 64000, generator=torch.Generator().manual_seed(0)) * 0.1
    outputs = []
    for htsat, log_mel in ((there["HTSAT"], there["LogMel"]), (common.HTSAT, common.LogMel)):
        torch.manual_seed(0)
        encoder = htsat(16, (1, 2), (2, 4), 8).eval()
        outputs.append(encoder(log_mel()(waveform)))
    assert torch.equal(*outputs) and outputs[0].std() > 0


def test_gather_copied_alone_is_the_identity_on_one_process():
    there, _ = piece(common, "gather_with_grad")
    x = torch.randn(3, 2)
    assert there(x) is x


def test_psds_copied_alone():
    names = [name for kind in ("psd_roc", "psds") for name in needs(getattr(evaluation, kind))]
    there = copied(evaluation, ["psd_roc", "psds", *names])
    rng = np.random.default_rng(0)
    scores = [rng.random((20, 2)) for _ in range(3)]
    events = [{"label": "a", "onset": 1.0, "offset": 4.0}, {"label": "b", "onset": 2, "offset": 9}]
    rows = [{"duration": 10.0, "events": events} for _ in scores]
    values = []
    for roc, area in ((there["psd_roc"], there["psds"]), (evaluation.psd_roc, evaluation.psds)):
        values.append(area(roc(scores, rows, ["a", "b"], 0.5, 0.1, 0.1, 0.3, 0.5)))
    assert values[0] == values[1] > 0


@pytest.mark.parametrize("method", SCRIPTS)
def test_every_loss_copied_alone_needs_only_losses_of_its_section(method):
    """Not training_loss, which reads the settings and gathers the processes' embeddings."""
    module = SCRIPTS[method]
    source = inspect.getsource(module)
    numbers = sections_of(source)
    loss = next(i for i, line in enumerate(source.split("\n")) if line.startswith("# Loss"))
    names = [
        name
        for node in ast.parse(source).body
        if numbers[node.lineno - 1] == numbers[loss]
        for name in defined(node)
        if name != "training_loss"
    ]
    there = copied(module, names)
    g = torch.Generator().manual_seed(0)
    a, t, n = (torch.nn.functional.normalize(torch.randn(6, 8, generator=g), dim=1) for _ in "abc")
    sim, same = a @ t.T, torch.eye(6, dtype=torch.bool)
    tokens, slots, mask = torch.randn(6, 4, 8, generator=g), torch.randn(6, 5, 8), torch.ones(6, 4)
    cases = {
        "mga_clap": {
            "clap_loss": (sim, 0.1, same),
            "hard_negative_loss": (sim, 0.1, 0.15, same),
            "official_loss": (sim, 0.1, 0.15, same),
            "embedding_regulariser": (a,),
        },
        "t_clap": {"contrastive_loss": (sim, 14.0), "temporal_loss": (a, t, n)},
        "cacophony": {
            "contrastive_loss": (sim, 14.0),
            "caption_nll": (tokens, torch.ones(6, 4, dtype=torch.long), mask),
            "modality_gap": (a, t),
        },
        "collat": {
            "match": (slots, tokens, mask),
            "cross_token_loss": (slots, tokens, mask, torch.zeros(6, 4, dtype=torch.long)),
            "cross_global_loss": (sim, 14.0),
            "uni_token_loss": (slots, slots + 1),
        },
        "curation_clap": {
            "contrastive_loss": (14 * sim,),
            "soft_targets": (a, t, 0.3),
            "soft_labelled_loss": (14 * sim, same.float(), same.float()),
        },
    }[method]
    for name, given in cases.items():
        for ours, theirs in zip(
            torch.utils._pytree.tree_leaves(there[name](*given)),
            torch.utils._pytree.tree_leaves(getattr(module, name)(*given)),
        ):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs)), name
    uncalled = set(names) - set(cases) - {"sam_backward", "match_greedy", "soft_divergence"}
    assert not uncalled  # each loss has a case here, or is called by one that has
