"""What the library costs, measured: `drum-hf bench`. Speed is reported as ratios within one run."""
