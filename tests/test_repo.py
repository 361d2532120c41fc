"""The repository keeps its own rules: lint, imports, equation map, README commands, sizes."""

import ast
import dataclasses
import importlib
import itertools
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

import claims
import common
import readme
from conftest import ROOT

PAPERS = [p.stem for p in ROOT.glob("*.py") if p.stem not in ("common", "eval")]
SCRIPTS = [
    name for name in PAPERS if "class Config" in (ROOT / f"{name}.py").read_text()
]  # those that train
RUN_TIME = {"torch", "torchaudio", "transformers", "tokenizers", "numpy", "soundfile", "tqdm"}
READMES = [ROOT / "README.md", ROOT / "tools/README.md", ROOT / "results/README.md"]
RESULTS = (ROOT / "results/README.md").read_text()
TOOLS = [p.stem for p in (ROOT / "tools").glob("*.py") if p.stem != "__init__"]


def tracked():
    out = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if out.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in out.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.mark.parametrize("rule", ["format", "check"])
def test_ruff_finds_nothing(rule):
    words = [rule, "--check"] if rule == "format" else [rule]
    out = subprocess.run(
        [sys.executable, "-m", "ruff", *words, "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout + out.stderr


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", ["common", "eval", *PAPERS])
def test_imports_point_downward_only(name):
    """common: packages; a script and eval: common; none of them tools, which import anything."""
    outside = set(imports(ROOT / f"{name}.py")) - set(sys.stdlib_module_names) - RUN_TIME
    assert outside <= (set() if name == "common" else {"common"})


# What each numbered equation of a paper is about, read from the papers: a map that only agrees with
# the tags of its own file can still name the wrong equations
WORDS = {
    "mga_clap": "contrastive|affinity|sparsemax|query, key, value|softmax|weighted sum|"
    "hard-negative|weights",
    "t_clap": "cosine|sum|temporal",
    "cacophony": "contrastive|caption|sum|worst case|step to it|gradient there",
    "collat": "cross-token|cross-global|uni-token|sum",
    "curation_clap": "contrastive|similarit|audio-to-text target|text-to-audio target|KL",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_equation_map_names_what_the_paper_s_equations_are(name):
    doc = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
    lines = dict(re.findall(r"^  Eq\. \((\d+)\) +(.*) \S+$", doc, re.M))
    words = WORDS[name].split("|")
    assert list(lines) == [str(k) for k in range(1, len(words) + 1)]  # all, in the paper's order
    for number, word in enumerate(words, 1):
        assert word.lower() in lines[str(number)].lower(), f"Eq. ({number}): {word}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_equation_map_and_tags_agree(name):
    source, shared = (ROOT / f"{name}.py").read_text(), (ROOT / "common.py").read_text()
    doc = ast.get_docstring(ast.parse(source))
    mapped = re.findall(r"^  Eq\. \((\d+)\) .* (\S+)$", doc, re.M)
    own = re.findall(r"#.*?Eq\. \((\d+)\)", source.replace(doc, ""))
    there = re.findall(rf"# {name.upper().replace('_', '-')} Eq\. \((\d+)\)", shared)
    assert sorted(own + there) == sorted(
        n for n, _ in mapped
    )  # each in one map line and one tagged line
    module = importlib.import_module(name)
    for number, function in mapped:
        owner, path = (
            (common, function[7:]) if function.startswith("common.") else (module, function)
        )
        for part in path.split("."):
            owner = getattr(owner, part)
        text = ast.unparse(ast.parse("0")) and __import__("inspect").getsource(owner)
        assert f"Eq. ({number})" in text, f"Eq. ({number}) is not in {function}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_equation_s_function_is_called_by_a_test_of_its_values(name):
    tests = (ROOT / f"tests/test_equations_{name}.py").read_text()
    functions = [
        node
        for node in ast.parse(tests).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    ]
    bodies = [
        body
        for body in (ast.get_source_segment(tests, f) for f in functions)
        if re.search(r"approx|allclose|assert_close|equal", body)
    ]
    mapped = re.findall(
        r"^  Eq\. \(\d+\) .* (\S+)$",
        ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())),
        re.M,
    )
    assert (
        len(mapped)
        == {"mga_clap": 8, "t_clap": 3, "cacophony": 6, "collat": 4, "curation_clap": 5}[name]
    )  # the papers' numbered equations
    for function in mapped:
        called = function.removesuffix(".forward").split(".")[-1]
        assert any(re.search(rf"\b{called}\(", body) for body in bodies), function


@pytest.mark.parametrize("name", PAPERS)
def test_deviations_are_numbered_without_gaps_and_config_fields_have_help(name):
    module = importlib.import_module(name)
    numbers = [int(n) for n in re.findall(r"^  D(\d+) ", module.__doc__, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
    used = {
        int(n)
        for n in re.findall(
            r"D(\d+)", (ROOT / f"{name}.py").read_text().replace(module.__doc__, "")
        )
    }
    assert used == set(numbers)  # each is marked where it happens
    for preset in module.Config.presets.values():
        assert set(preset) <= {f.name for f in dataclasses.fields(module.Config)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_sections_stand_in_the_house_order(name):
    banners = re.findall(r"^# -{90,}\n# (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
    own = {"Pictures", "Curation"}  # what not every script has
    assert [b for b in banners if b not in own] == [
        "Config",
        "Model",
        "Loss",
        "Data",
        "Train",
        "Published",
        "Entry",
    ]


def code_of(name):
    """Lines of code of a script, without comments, docstrings, imports and its Config."""
    source = (ROOT / f"{name}.py").read_text()
    left_out = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "name", "") == "Config":
            left_out.update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.update(range(node.lineno, node.end_lineno + 1))
    lines = [line.partition("  #")[0].strip() for line in source.splitlines()]
    lines = [line for i, line in enumerate(lines, 1) if i not in left_out]
    return [line for line in lines if line and not line.startswith("#")]


def longest_common_run(first, second):
    longest, ends = 0, {}  # ends: index in `second` -> equal lines up to there
    for line in first:
        ends = {j: ends.get(j - 1, 0) + 1 for j, other in enumerate(second) if other == line}
        longest = max(longest, *ends.values(), 0)
    return longest


def test_no_two_scripts_share_more_than_eight_lines_in_a_row():
    assert longest_common_run(list("abcdef"), list("xbcdyef")) == 3
    code = {name: code_of(name) for name in SCRIPTS}
    for first, second in itertools.combinations(SCRIPTS, 2):
        assert longest_common_run(code[first], code[second]) <= 8, (first, second)


def readme_commands():
    for text in (path.read_text() for path in READMES):
        for block in re.findall(r"```sh\n(.*?)```", text, re.S):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split("  #")[0].strip()
                if line:
                    yield from (part.strip() for part in line.split("&&"))
        for command in re.findall(r"`((?:python|torchrun) [^`]+)`", text):
            placeholder = re.search(r"\b(MODEL|DATASET|NAME|DATA|MANIFEST)\b|\.\.\.", command)
            if " --" in command and not placeholder:
                yield " ".join(command.split())


def parsed(command):
    """(module, argv) of a python command of ours, or None."""
    words = shlex.split(command)
    words = words[words.index("run") + 1 :] if words[:2] == ["uv", "run"] else words
    words = words[1:] if words[0] in ("python", "torchrun") else words
    for i, word in enumerate(words):
        if word == "-m" and words[i + 1].startswith("tools."):
            return words[i + 1], words[i + 2 :]
        if word.endswith(".py"):
            return word[:-3], words[i + 1 :]
    return None


def test_every_readme_command_of_ours_parses():
    seen = set()
    for command in readme_commands():
        found = parsed(command)
        if found is None or found[0].startswith("tests/"):
            continue
        name, argv = found
        seen.add(name)
        module = importlib.import_module(name)
        if name in SCRIPTS:
            if "--resume" not in argv:
                common.cli(module.Config, module.__doc__, argv)
        else:
            module.parse(argv)
    assert seen == {"eval", *SCRIPTS, *(f"tools.{name}" for name in TOOLS)}  # each is shown


@pytest.mark.parametrize(
    "words",
    [
        "datasets",
        "datasets csv",
        "datasets check",
        "datasets resample",
        "scenes",
        "captions",
        "captions rewrite",
        "captions recaption",
        "downstream",
        "hear",
        "figures",
        "figures results",
        "demo",
    ],
)
def test_every_tool_has_its_own_help(words, capsys):
    name, *command = words.split()
    with pytest.raises(SystemExit):
        importlib.import_module(f"tools.{name}").parse([*command, "--help"])
    assert f"usage: python -m tools.{words} " in capsys.readouterr().out


def test_the_table_of_scripts_tells_their_lines():
    """To five in a hundred, and README stays a page of ten minutes."""
    text = (ROOT / "README.md").read_text()
    told = dict(re.findall(r"^\| `(\w+)\.py` .*\| ([\d,]+) \|$", text, re.M))
    assert set(told) == set(SCRIPTS)
    for name, lines in told.items():
        there = len((ROOT / f"{name}.py").read_text().splitlines())
        assert int(lines.replace(",", "")) == pytest.approx(there, rel=0.05), name
    assert len(text.splitlines()) <= 250 and len(text.encode()) <= 20_000


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_the_readmes_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text())
    assert all((path.parent / link).exists() for link in links)


def test_the_first_readme_command_and_ci_are_what_they_say():
    commands = list(readme_commands())
    assert any("mga_clap.py --data demo" in c for c in commands)
    test = next(c for c in commands if "pytest" in c)
    assert test in (ROOT / ".ci/run").read_text()


def test_measured_tables_agree_with_results():
    """Every table of results/README.md is what the stored runs and bench.json make it."""
    assert readme.written(RESULTS) == RESULTS, "run python tests/readme.py"
    shown = re.findall(r"<!-- (outcomes|study \w+|said \w+|bench) -->\n\|", RESULTS)
    runs = claims.read_runs()
    decided = {  # what was measured is shown
        f"study {name}"
        for name, study in claims.STUDIES.items()
        if study.claims
        and all(claims.outcome(study, claim, runs)["outcome"] != "open" for claim in study.claims)
    }
    assert len(decided) >= 4 and {"outcomes", "bench", *decided} <= set(shown)
    changed = re.sub(r"[+-]0\.\d{3} \[", "+9.999 [", RESULTS, count=1)
    assert readme.written(changed) == RESULTS != changed
    # one line of either kind from the stored runs, without claims.py
    runs = map(json.loads, (ROOT / "results/runs.jsonl").read_text().splitlines())
    common_to_both = {"size": "tiny", "epochs": 6, "eval_epochs": 3}
    frames = {"MGA-CLAP": [], "CLAP": []}
    for r in sorted(runs, key=lambda r: r["seed"]):
        if (r["method"], r["data"], r["split"]) == ("mga_clap", ["scenes_11"], "test"):
            changed = {k: v for k, v in r["changed"].items() if k not in common_to_both}
            plain = {"aggregator": "mean", "locality_blocks": 0, "hard_negatives": False}
            row = "CLAP" if changed == plain else "MGA-CLAP" if not changed else None
            if row:
                frames[row].append(r["scores"]["frame_mAP_raw"])
    ours, base = frames.values()
    cell = f"{np.mean(base):.3f} ± {np.std(base, ddof=1):.3f}"
    assert re.search(rf"^\| CLAP \| {len(base)} \|.*\| {cell} \|", RESULTS, re.M)
    side = scipy.stats.ttest_rel(ours, base).confidence_interval(0.95)
    said = f"{np.subtract(ours, base).mean():+.3f} [{side.low:+.3f}, {side.high:+.3f}]"
    claim = "frame_mAP_raw: MGA-CLAP above CLAP"
    assert f"| holds | mga_clap | {claim} | {said} | {len(ours)} |" in RESULTS


def test_every_picture_of_the_readme_is_there_and_small():
    shown = {
        (path.parent / name).resolve()
        for path in READMES
        for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", path.read_text())
    }
    assert len(shown) >= 7 and shown == set((ROOT / "results/pictures").iterdir())
    assert all(path.stat().st_size < 600_000 for path in shown)


def test_no_large_files_and_no_machine_paths():
    for path in tracked():
        assert path.stat().st_size < 1_000_000, path
        if path.suffix in (".py", ".md", ".toml", ".json") and path.name != "test_repo.py":
            assert not re.search(r"(?<![\w.])/(work|root|farm)/", path.read_text()), path
