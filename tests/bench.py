"""Speed against a named peer, both measured in the same run.

  python tests/bench.py htsat|psds|psds_large|curate|matching|all [--json results/bench.json]

Prints and writes a list of {"name", "ours", "peer", "peer_name", "unit", "ratio", "machine",
"settings"}; a ratio above 1 means ours is better.
"""
import argparse
import hashlib
import json
import multiprocessing
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, ClapAudioConfig, ClapAudioModel  # noqa: E402

import collat  # noqa: E402
import common  # noqa: E402
import curation_clap  # noqa: E402


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] if (
        Path("/proc/cpuinfo").exists()) else [platform.processor()]
    return f"{names[0]}, {torch.get_num_threads()} threads"


def alternate(steps: dict, repeats: int, device) -> dict:
    """Median seconds of each step; the steps take turns, so that a noisy machine hits both alike."""
    seconds = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def htsat(tiny: bool) -> dict:
    """Forward, backward and Adam step of HTS-AT on log-mel input, against transformers' ClapAudioModel.

    Same weights, same batch, drop path and dropout off in both, fp32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = dict(patch_embeds_hidden_size=16, depths=[2, 2], num_attention_heads=[2, 4], patch_size=16,
                 patch_stride=[16, 16], hidden_size=32) if tiny else dict(patch_embeds_hidden_size=96)
    torch.manual_seed(0)
    theirs = ClapAudioModel(ClapAudioConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)).train().to(device)
    ours = common.HTSAT(16, (2, 2), (2, 4), 16, drop_path=0.0) if tiny else common.HTSAT(drop_path=0.0)
    common.load_strict(ours, common.htsat_state(theirs.state_dict()), "ClapAudioModel")
    ours.train().to(device)
    batch, repeats = (2, 2) if tiny else (4, 15)
    log_mel = torch.randn(batch, 1001, 64, device=device) * 10 - 30
    longer = torch.zeros(batch, 1, dtype=torch.bool, device=device)
    optimisers = {name: torch.optim.Adam([p for p in m.parameters() if p.requires_grad], 1e-6, fused=True)
                  for name, m in (("ours", ours), ("peer", theirs))}

    def step(name, forward):
        forward().square().mean().backward()
        optimisers[name].step()
        optimisers[name].zero_grad(set_to_none=True)

    medians = alternate({
        "ours": lambda: step("ours", lambda: ours(log_mel)),
        "peer": lambda: step("peer", lambda: theirs(input_features=log_mel[:, None], is_longer=longer).last_hidden_state)},
        repeats, device)
    return {"name": "htsat", "ours": medians["ours"], "peer": medians["peer"],
            "peer_name": "transformers ClapAudioModel", "unit": "s per training step", "ratio": medians["peer"] / medians["ours"],
            "machine": machine(), "settings": {
                "batch": batch, "input": "log-mel (1001, 64)", "size": "tiny" if tiny else "paper", "dtype": "float32",
                "repeats": repeats, "torch": str(torch.__version__)}}


def detection_clips(n_clips: int, n_classes: int, n_frames=32, frame_s=0.3125, seed=0):
    """Random scores (one per frame and class), raised under four random events a clip."""
    rng = np.random.default_rng(seed)
    classes, rows, scores = [f"c{k:03d}" for k in range(n_classes)], [], []
    edges = np.arange(n_frames + 1) * frame_s
    for _ in range(n_clips):
        events, values = [], rng.normal(size=(n_frames, n_classes)).astype(np.float32)
        for c in rng.choice(n_classes, min(4, n_classes), replace=False):
            onset = rng.uniform(0, 8)
            events.append({"label": classes[c], "onset": onset, "offset": min(10.0, onset + rng.uniform(0.3, 4))})
            values[(edges[:-1] < events[-1]["offset"]) & (edges[1:] > onset), c] += 2
        scores.append(values)
        rows.append({"duration": 10.0, "events": events})
    return scores, rows, classes


PSDS = {"PSDS1": dict(dtc=0.7, gtc=0.7, cttc=None, alpha_ct=0.0), "PSDS2": dict(dtc=0.1, gtc=0.1, cttc=0.3, alpha_ct=0.5)}


def measure_psds(who: str, n_clips: int, n_classes: int) -> dict:
    """Seconds, values and peak memory (GB, less that of the inputs) of both scores; to be run in a process of its own."""
    scores, rows, classes = detection_clips(n_clips, n_classes)
    if who == "peer":
        import pandas as pd
        from sed_scores_eval import intersection_based
        edges = np.arange(33) * 0.3125
        tables = {f"f{i}": pd.DataFrame({"onset": edges[:-1], "offset": edges[1:], **dict(zip(classes, values.T))})
                  for i, values in enumerate(scores)}
        truth = {f"f{i}": [(e["onset"], e["offset"], e["label"]) for e in row["events"]] for i, row in enumerate(rows)}
        durations = {f"f{i}": 10.0 for i in range(n_clips)}
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    values = {}
    for name, s in PSDS.items():
        if who == "peer":
            values[name] = float(intersection_based.psds(
                tables, truth, durations, dtc_threshold=s["dtc"], gtc_threshold=s["gtc"], cttc_threshold=s["cttc"],
                alpha_ct=s["alpha_ct"], alpha_st=0.0, max_efpr=100.0)[0])
        else:
            values[name] = common.psds(common.psd_roc(scores, rows, classes, 0.3125, **s), 0.0)
    return {"values": values, "seconds": time.perf_counter() - start,
            "extra_GB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20,
            "total_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}


def in_own_process(*args) -> dict:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_psds, args)


def psds(tiny: bool) -> dict:
    """PSDS1 and PSDS2 over all thresholds, against sed_scores_eval; the values must agree."""
    size = (20, 5) if tiny else (1000, 100)
    ours, peer = in_own_process("ours", *size), in_own_process("peer", *size)
    for name in PSDS:
        if abs(ours["values"][name] - peer["values"][name]) > 1e-6:
            raise AssertionError(f"{name}: ours {ours['values'][name]}, sed_scores_eval {peer['values'][name]}")
    return {"name": "psds", "ours": ours["seconds"], "peer": peer["seconds"], "peer_name": "sed_scores_eval",
            "unit": "s for PSDS1 + PSDS2", "ratio": peer["seconds"] / ours["seconds"], "machine": machine(), "settings": {
                "clips": size[0], "classes": size[1], "frames": 32, "values": ours["values"],
                "ours_extra_GB": ours["extra_GB"], "peer_extra_GB": peer["extra_GB"]}}


def psds_large(tiny: bool) -> dict:
    """The size of AudioSet-Strong's evaluation set, where sed_scores_eval cannot finish: no peer."""
    size = (30, 6) if tiny else (16996, 407)
    ours = in_own_process("ours", *size)
    return {"name": "psds_large", "ours": ours["seconds"], "peer": None, "peer_name": "none: sed_scores_eval runs out of memory",
            "unit": "s for PSDS1 + PSDS2", "ratio": None, "machine": machine(), "settings": {
                "clips": size[0], "classes": size[1], "frames": 32, "values": ours["values"], "extra_GB": ours["extra_GB"],
                "total_GB": ours["total_GB"]}}


def curate_pool(folder: Path, n_clips: int, n_captions: int, peer: bool, done: Path) -> dict:
    """Curate n_clips random clips from a file of embeddings, block by block; to be run in a process of its own.

    -> seconds of ours and of bare matrix products of the same blocks, the manifest's hash, peak memory in all (GB).
    """
    torch.manual_seed(0)
    text = curation_clap.half(torch.randn(n_captions, DIM).numpy())
    search = curation_clap.Search(text, CURATE_SIGMA, device="cuda" if torch.cuda.is_available() else "cpu")
    captions = [f"caption {q}" for q in range(n_captions)]
    done.mkdir(exist_ok=True)
    seconds, paths = {"ours": 0.0, "peer": 0.0}, []
    sync = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    start = time.perf_counter()
    for number, (rows, embeds) in enumerate(curation_clap.pool_blocks([folder / f"pool_{n_clips}.npz"], CURATE_BLOCK if n_clips > 5000 else 256)):
        paths.append(done / f"pairs_{number:06d}.jsonl")
        if not paths[-1].exists():
            curation_clap.mine_block(paths[-1], rows, curation_clap.half(embeds), search, captions)
        sync()
        seconds["ours"] += time.perf_counter() - start
        audio = torch.from_numpy(embeds).to(search.device, search.dtype)
        start = time.perf_counter()
        for i in range(0, len(audio) if peer else 0, search.rows):
            torch.mm(audio[i:i + search.rows], search.columns, out=search.held[:len(audio[i:i + search.rows])])
        sync()
        seconds["peer"] += time.perf_counter() - start
        start = time.perf_counter()
    clips, pairs = curation_clap.join_blocks(paths, done / "curated.jsonl")
    return {**seconds, "clips": clips, "pairs": pairs, "hash": hashlib.sha256((done / "curated.jsonl").read_bytes()).hexdigest(),
            "peak_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}


DIM, CURATE_SIGMA, CURATE_BLOCK = 128, 0.36, 8192  # of random pairs 2 in 100,000 are kept, as many as DU keeps in the paper


def curate(tiny: bool) -> dict:
    """Curation from stored embeddings to a manifest, against bare matrix products of the same size; memory; a killed run."""
    sizes, n_captions = ((500, 1500), 700) if tiny else ((10_000, 200_000), 10_000)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for n in sizes:
            embeds = np.random.default_rng(n).normal(size=(n, DIM)).astype(np.float32)
            np.savez(folder / f"pool_{n}.npz", audio_embeds=embeds, audio=np.array([f"/pool/{i:09d}.wav" for i in range(n)]))
        with context.Pool(1, maxtasksperchild=1) as pool:  # a process each, for the peak of its memory
            apply = (lambda f, a: f(*a)) if tiny else pool.apply
            small, large = (apply(curate_pool, (folder, n, n_captions, n == sizes[1], folder / f"done_{n}")) for n in sizes)
            if tiny:  # a part is missing
                shutil.copytree(folder / f"done_{sizes[1]}", folder / "killed")
                (folder / "killed/pairs_000001.jsonl").unlink()
            else:
                killed = context.Process(target=curate_pool, args=(folder, sizes[1], n_captions, False, folder / "killed"))
                killed.start()
                while killed.is_alive() and not (folder / "killed/pairs_000001.jsonl").exists():
                    time.sleep(0.01)
                killed.kill()
                killed.join()
            resumed = apply(curate_pool, (folder, sizes[1], n_captions, False, folder / "killed"))
        if resumed["hash"] != large["hash"]:
            raise AssertionError("a killed and resumed curation wrote another manifest")
    n_pairs = sizes[1] * n_captions
    return {"name": "curate", "ours": large["ours"], "peer": large["peer"], "peer_name": "bare matrix products of the same blocks",
            "unit": f"s for {n_pairs / 1e6:,.0f} million pairs", "ratio": large["peer"] / large["ours"], "machine": machine(), "settings": {
                "million_pairs_per_s": round(n_pairs / large["ours"] / 1e6),
                "clips": sizes[1], "captions": n_captions, "dimensions": DIM, "sigma": CURATE_SIGMA, "pairs_kept": large["pairs"],
                "peak_GB": {str(n): round(r["peak_GB"], 3) for n, r in zip(sizes, (small, large))}, "killed_and_resumed_to_the_same_bytes": True}}


def matching(tiny: bool) -> dict:
    """CoLLAT's greedy matching of 64 clips, all 77 tokens real, against a training step of 64 clips at the paper's size.

    On a CPU the step is that of 2 clips times 32: forward and backward of both views, without the optimiser's part.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width, layers, heads, batch, N = (32, 1, 2, 8, 20) if tiny else (768, 12, 12, 64, 77)
    part = batch if device.type == "cuda" or tiny else 2
    torch.manual_seed(0)
    tower = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
                                                       projection_dim=width, max_position_embeddings=N))
    model = collat.Model(dict(audio=dict(dim=width, layers=layers, heads=heads, patch=16, stride=48 if tiny else 10), blocks=8),
                         common.TextEncoder(tower, None, N)).to(device).train()
    log_mel, mask = torch.randn(part, 1024, 128, device=device), torch.ones(batch, N, dtype=torch.long, device=device)
    ids = torch.randint(1, 49000, (batch, N), device=device)
    predicted, text = torch.randn(batch, N, width, device=device), model.text.token_embeds(ids)
    cfg, autocast = collat.Config(data=[]), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def step():
        with autocast:
            outputs = model(log_mel, ids[:part], mask[:part])
        collat.training_loss(cfg, *outputs)[0].backward()

    medians = alternate({"ours": lambda: collat.match(predicted, text, mask), "peer": step}, 1 if device.type == "cpu" else 10, device)
    medians["peer"] *= batch / part
    return {"name": "matching", "ours": medians["ours"], "peer": medians["peer"], "peer_name": "a training step, matching included",
            "unit": f"s for {batch} clips", "ratio": medians["peer"] / medians["ours"], "machine": machine(), "settings": {
                "share_of_the_step": medians["ours"] / medians["peer"], "clips": batch, "slots": N, "tokens": N, "width": width,
                "clips_timed": part, "dtype": "bfloat16" if device.type == "cuda" else "float32"}}


BENCHES = {"matching": matching, "htsat": htsat, "psds": psds, "psds_large": psds_large, "curate": curate}


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("name", choices=[*BENCHES, "all"])
    parser.add_argument("--json", help="write the list to this file")
    parser.add_argument("--tiny", action="store_true", help="miniature sizes, to check that it runs")
    args = parser.parse_args(argv)
    results = [BENCHES[name](args.tiny) for name in ([args.name] if args.name != "all" else BENCHES)]
    for r in results:
        peer = f"{r['peer_name']} {r['peer']:.3f} {r['unit']}, ratio {r['ratio']:.2f}" if r["peer"] else f"{r['unit']} ({r['peer_name']})"
        print(f"{r['name']}: ours {r['ours']:.3f}, {peer} ({r['machine']}; {r['settings']})")
    if args.json:  # the other benches' last results stay
        path, names = Path(args.json), {r["name"] for r in results}
        kept = [r for r in json.loads(path.read_text()) if r["name"] not in names] if path.exists() else []
        common.write_lines(path, [json.dumps(kept + results, indent=1)])
    return results


if __name__ == "__main__":
    main()
