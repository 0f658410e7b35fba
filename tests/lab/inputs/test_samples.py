"""How real matrices are dealt to the seeds."""

import torch

from muonwire.lab.engine.claim import Setting
from muonwire.lab.inputs import samples
from muonwire.lab.inputs.captured import key, write
from muonwire.lab.inputs.text_training import TEXT_TRAINING


def test_the_seeds_deal_every_real_matrix_once_and_no_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "REAL", {TEXT_TRAINING: "training"})
    folder = TEXT_TRAINING.folder(tmp_path, quick=False)
    folder.mkdir(parents=True)
    made = {key("step 1", "momentum", f"layer {i:02}"): torch.full((2, 3), float(i)) for i in range(12)}
    write(folder, made, {})
    dealt = []
    for seed in range(samples.NUM_PARTS):
        setting = Setting(seed=seed, quick=False, folder=tmp_path, inputs=(TEXT_TRAINING,))
        found = list(samples.real_samples(setting))
        assert {what for what, _ in found} == {"training momentum"}
        dealt += [float(x[0, 0]) for _, x in found]
    assert sorted(dealt) == [float(i) for i in range(1, 12)]
