"""Speed against a named peer, both measured in the same run.

  python tests/bench.py htsat|all [--json results/bench.json]

Prints and writes a list of {"name", "ours", "peer", "peer_name", "unit", "ratio", "machine",
"settings"}; a ratio above 1 means ours is better.
"""
import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from transformers import ClapAudioConfig, ClapAudioModel  # noqa: E402

import common  # noqa: E402


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


BENCHES = {"htsat": htsat}


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("name", choices=[*BENCHES, "all"])
    parser.add_argument("--json", help="write the list to this file")
    parser.add_argument("--tiny", action="store_true", help="miniature sizes, to check that it runs")
    args = parser.parse_args(argv)
    results = [BENCHES[name](args.tiny) for name in ([args.name] if args.name != "all" else BENCHES)]
    for r in results:
        print(f"{r['name']}: ours {r['ours']:.3f}, {r['peer_name']} {r['peer']:.3f} {r['unit']}, ratio {r['ratio']:.2f} "
              f"({r['machine']}; {r['settings']})")
    if args.json:
        common.write_lines(Path(args.json), [json.dumps(results, indent=1)])
    return results


if __name__ == "__main__":
    main()
