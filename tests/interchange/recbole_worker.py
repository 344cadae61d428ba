"""RecBole's side of test_recbole.py, run by the Python of an environment with RecBole 1.2.1.

python recbole_worker.py train DATA_PATH OUTPUT          # trains its S3Rec for an epoch each stage on DATA_PATH/few
python recbole_worker.py score CHECKPOINT DATASET DATA_PATH HISTORIES SCORES
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import S3Rec
from recbole.trainer import S3RecTrainer
from recbole.utils import init_seed

torch.autograd.set_detect_anomaly(False)  # which importing RecBole turns on
torch.set_num_threads(1)
QUIET = {"show_progress": False, "use_gpu": False, "state": "ERROR", "train_neg_sample_args": None}
FIELDS = {"load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]}}


def config_of(dataset: str, settings: dict[str, Any]) -> Config:
    arguments, sys.argv = sys.argv, sys.argv[:1]  # RecBole reads them as settings
    config = Config(model="S3Rec", dataset=dataset, config_dict={**FIELDS, **settings, **QUIET})
    sys.argv = arguments
    return config


def train(data_path: str, output: str) -> None:
    """pretrain.pth, finetune.pth, dataset.pth and tokens.json in ``output``."""
    settings: dict[str, Any] = {"data_path": data_path, "checkpoint_dir": output, "save_dataset": True}
    settings |= {"hidden_size": 16, "n_heads": 4, "inner_size": 24, "MAX_ITEM_LIST_LENGTH": 12, "epochs": 1}
    settings |= {"pretrain_epochs": 1, "save_step": 1, "learning_rate": 0.01, "initializer_range": 0.1}
    settings |= {"user_inter_num_interval": "[5,inf)", "item_inter_num_interval": "[2,inf)"}
    # RecBole 1.2.1 is older than torch.load's refusal of its own checkpoints.
    load, torch.load = torch.load, lambda *args, **options: load(*args, **{**options, "weights_only": False})
    for stage in ("pretrain", "finetune"):
        config = config_of("few", {**settings, "train_stage": stage, "pre_model_path": f"{output}/pretrain.pth"})
        init_seed(1, True)
        dataset = create_dataset(config)
        training, validation, _ = data_preparation(config, dataset)
        trainer = S3RecTrainer(config, S3Rec(config, training._dataset))
        trainer.fit(training, validation, saved=True, show_progress=False, verbose=False)
        Path(trainer.saved_model_file).rename(f"{output}/{stage}.pth")
    torch.load = load
    Path(output, "few-SequentialDataset.pth").rename(f"{output}/dataset.pth")
    tokens = {name: table.tolist() for name, table in dataset.field2id_token.items()}
    Path(output, "tokens.json").write_text(json.dumps(tokens))


def score(checkpoint: str, name: str, data_path: str, histories: str, output: str) -> None:
    """Loads the checkpoint strictly, where it is plain also as ``pre_model_path``, and writes scores [B, items] of
    histories of tokens, and the items' tokens."""
    try:
        tree = torch.load(checkpoint)
        config = config_of(name, {**tree["config"], "pre_model_path": checkpoint, "data_path": data_path})
    except pickle.UnpicklingError:  # RecBole's own
        tree = torch.load(checkpoint, weights_only=False)
        config = tree["config"]
        config["train_stage"] = "pretrain"  # builds the model without a pretrained one
    dataset = create_dataset(config)
    model = S3Rec(config, data_preparation(config, dataset)[0]._dataset)
    model.load_state_dict(tree["state_dict"], strict=True)
    model.load_other_parameter(tree["other_parameter"])
    rows = [
        [dataset.field2token_id["item_id"][item] for item in row] for row in json.loads(Path(histories).read_text())
    ]
    padded = torch.zeros(len(rows), config["MAX_ITEM_LIST_LENGTH"], dtype=torch.int64)
    for row, items in zip(padded, rows, strict=True):
        row[: len(items)] = torch.tensor(items)
    batch = {model.ITEM_SEQ: padded, model.ITEM_SEQ_LEN: torch.tensor([len(row) for row in rows])}
    with torch.no_grad():
        scores = model.eval().full_sort_predict(batch)
    np.savez(output, scores=scores[:, 1:].numpy(), items=dataset.field2id_token["item_id"][1:].astype(str))


if __name__ == "__main__":
    {"train": train, "score": score}[sys.argv[1]](*sys.argv[2:])
