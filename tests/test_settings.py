"""Settings: the same from Python and from the command line, and every value checked."""

import dataclasses
import math
import typing

import pytest

import common
from test_scripts import SCRIPTS, every_script

# Nothing is read at this stage, so --data may be anything
ABSURD = [-1, 0, 1, 10**12, -0.5, 0.5, 1.0, 1e300, math.inf, -math.inf, math.nan, True, "x", "", []]


def kinds_of(config_class):
    """Field name -> type and interval of its numbers, or type and None."""
    for name, kind in common.settings_of(config_class).items():
        if typing.get_origin(kind) is list:
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is typing.Annotated:
            yield name, *typing.get_args(kind)
        else:
            yield name, kind, None


@every_script
def test_every_number_has_a_range_and_lies_in_it(method):
    config_class = SCRIPTS[method].Config
    for name, kind, interval in kinds_of(config_class):
        assert (kind in (int, float)) == (interval is not None), name
    for (name, choice), preset in config_class.presets.items():
        config_class(data=["x"], **{name: choice})  # the presets' values are checked, too
        assert set(preset) <= {field.name for field in dataclasses.fields(config_class)}


@every_script
def test_an_absurd_value_is_refused_in_one_sentence_or_lies_in_the_range(method):
    config_class, refused = SCRIPTS[method].Config, 0
    fields = common.settings_of(config_class)
    for name, kind, interval in kinds_of(config_class):
        of_list = typing.get_origin(fields[name]) is list
        for value in ABSURD:
            given = {"data": ["x"], name: [value] if of_list else value}
            try:
                config_class(**given)
            except ValueError as error:
                assert str(error).startswith("--") and "\n" not in str(error)
                refused += 1
                continue
            if interval:
                low, high = map(float, interval[1:-1].split(","))
                assert low <= value <= high and not isinstance(value, bool), (name, value)
            else:
                assert isinstance(value, bool) if kind is bool else isinstance(value, str), name
    assert refused > 5 * len(fields)


def refused(words, capsys):
    """What mga_clap.py says to these flags."""
    with pytest.raises(SystemExit):
        common.cli(SCRIPTS["mga_clap"].Config, "x", words)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--lr", "nan"], "--lr nan: expected a number in (0, inf)"),
        (["--lr", "0"], "--lr 0.0: expected a number in (0, inf)"),
        (["--max-bad", "nan"], "--max-bad nan: expected a number in [0, 1]"),
        (["--max-bad", "-0.1"], "--max-bad -0.1: expected a number in [0, 1]"),
        (["--max-bad", "5"], "--max-bad 5.0: expected a number in [0, 1]"),
        (["--epochs", "-1"], "--epochs -1: expected a number in [1, 1e9]"),
        (["--drop-path", "1"], "--drop-path 1.0: expected a number in [0, 1)"),
        (["--audio-depths", "2", "0"], "--audio-depths 0: expected a number in [1, 200]"),
        (["--audio-depths", "2"], "--audio-depths has 1 numbers, --audio-heads 4"),
        (["--audio-heads", "5", "8", "16", "32"], "5 heads do not divide the 96 channels"),
        (["--audio-patch", "3"], "4 * patch * 2^(stages - 1) = 96 must divide 256"),
    ],
    ids=" ".join,
)
def test_a_flag_out_of_range_is_refused_by_the_command_line(words, sentence, capsys):
    words = ["--data", "x", *words] if words[0] != "--data" else words
    assert sentence in refused(words, capsys)


def test_a_value_of_another_type_is_refused_from_python():
    config_class = SCRIPTS["mga_clap"].Config
    for name, value, sentence in (
        ("lr", "1e-3", "--lr '1e-3': expected float"),
        ("epochs", 2.0, "--epochs 2.0: expected int"),
        ("epochs", True, "--epochs True: expected int"),
        ("hard_negatives", 1, "--hard-negatives 1: expected bool"),
        ("variant", "jax", "--variant jax: expected paper or official"),
        ("data", "demo", "--data 'demo': expected a list"),
        ("learning_rate", 1e-3, "no such setting: learning_rate; there are "),
    ):
        with pytest.raises(ValueError) as error:
            config_class(**{"data": ["x"], name: value})
        assert str(error.value).startswith(sentence)
    assert config_class(data=["x"], lr=1).lr == 1  # a whole number is a number
    with pytest.raises(ValueError, match="the setting data is missing"):
        config_class(size="tiny")


@every_script
@pytest.mark.parametrize("data", ["demo", "m.jsonl"])
def test_python_and_the_command_line_make_the_same_settings(method, data):
    script = SCRIPTS[method]
    assert script.Config(data=[data], seed=3) == common.cli(
        script.Config, script.__doc__, ["--data", data, "--seed", "3"]
    )
    tiny = script.Config(data=[data], size="tiny", text_model="none")
    for name, value in script.TINY.items():
        assert getattr(tiny, name) == value  # the preset is not left out in silence
    assert tiny == common.cli(
        script.Config, script.__doc__, ["--data", data, "--size", "tiny", "--text-model", "none"]
    )
    given = script.Config(data=[data], size="tiny", save_steps=7)
    assert given.save_steps == 7 and given.batch_size == script.TINY["batch_size"]
    assert dataclasses.replace(given, seed=1) == script.Config(
        data=[data], size="tiny", save_steps=7, seed=1
    )
    assert script.Config(**dataclasses.asdict(given)) == given  # as a checkpoint stores them


@every_script
def test_help_is_in_groups_with_those_of_the_paper_first(method, capsys):
    with pytest.raises(SystemExit):
        common.cli(SCRIPTS[method].Config, SCRIPTS[method].__doc__, ["--help"])
    text = capsys.readouterr().out
    assert f"python {method}.py --data demo" in text.partition("Run:")[2]  # the example
    groups = [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert groups[:2] == ["options", "data"] and groups[-1] == "run" and len(groups) >= 6
    comments = common.field_comments(SCRIPTS[method].Config)
    for name in common.settings_of(SCRIPTS[method].Config):
        heading, comment = comments[name]
        assert heading in groups and len(comment) > 5, name
