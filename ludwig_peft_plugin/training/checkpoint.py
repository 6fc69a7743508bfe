"""Checkpoints: one safetensors file with the trained weights, the optimiser and the position, never the base."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from ludwig.utils.checkpoint_utils import Checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ludwig_peft_plugin.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = "ludwig_peft_plugin/1"
MODEL, OPTIMIZER, HOOKS = "model/", "optimizer/", "adapter/"


class TrainingCheckpoint(Checkpoint):
    """Save and restore a training run.

    The file's tensors are `model/<parameter>` for every trained parameter and `optimizer/<index>/<name>` for the
    optimiser's state, and `adapter/<name>` for what an adapter keeps beside its parameters (see `StepHooks`);
    everything else is JSON in the file's header. Nothing in it can run code. A file is written
    beside its target and moved over it, so a crash or a full disk leaves the previous one whole.

    Attributes:
        extra: JSON values of the trainer (progress, position in the epoch), saved with and restored by `load`.
        scheduler_state: the learning-rate schedule's state of the last `load`.
        hooks: the state of the adapter's `StepHooks`, saved with and restored by `load`; None where it has none.
    """

    def __init__(self, distributed: Any, model: Any, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__(distributed, model, optimizer, scheduler)
        self.extra: dict[str, Any] = {}
        self.scheduler_state: dict[str, Any] | None = None
        self.hooks: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None

    def save(self, save_path: str, global_step: int) -> None:
        """Write the state of step `global_step` to the file `save_path`.

        Raises:
            CheckpointError: the file cannot be written; the previous one is left as it was.
        """
        if not self.distributed.is_coordinator():
            return
        tensors = {MODEL + name: parameter.detach() for name, parameter in trained_parameters(self.model).items()}
        header: dict[str, Any] = {"format": FORMAT, "global_step": global_step, "extra": self.extra}
        if self.optimizer is not None:
            optimizer_tensors, header["optimizer"] = _split_optimizer(self.optimizer.state_dict())
            tensors |= optimizer_tensors
        if self.scheduler is not None:
            header["scheduler"] = self.scheduler.state_dict()
        if self.hooks is not None:
            tensors |= {HOOKS + name: tensor for name, tensor in self.hooks[0].items()}
            header["hooks"] = self.hooks[1]
        # A copy on the CPU: tied or sliced tensors would share memory, which safetensors refuses.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        _write(tensors, {"state": json.dumps(header)}, save_path)

    def load(self, save_path: str, device: torch.device | None = None) -> bool:
        """Restore model and optimiser from `save_path`; `extra` and `scheduler_state` are left for the trainer.

        Raises:
            CheckpointError: the file is not one of ours, is damaged, or belongs to another adapter or base.
        """
        tensors, header = _read(save_path, device)
        self.global_step = header["global_step"]
        self.extra = header.get("extra", {})
        self.scheduler_state = header.get("scheduler")
        kept = {name[len(HOOKS) :]: tensor for name, tensor in tensors.items() if name.startswith(HOOKS)}
        self.hooks = (kept, header["hooks"]) if "hooks" in header else None
        weights = {name[len(MODEL) :]: tensor for name, tensor in tensors.items() if name.startswith(MODEL)}
        _load_weights(self.model, weights, save_path)
        if self.optimizer is not None and "optimizer" in header:
            self.optimizer.load_state_dict(_join_optimizer(tensors, header["optimizer"]))
        return True

    def get_state_for_inference(self, save_path: str, device: torch.device | None = None) -> Mapping[str, Any]:
        """Return the trained parameters by name."""
        tensors, _ = _read(save_path, device)
        return {name[len(MODEL) :]: tensor for name, tensor in tensors.items() if name.startswith(MODEL)}


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def write_json(path: str, value: Any) -> None:
    """Write JSON beside `path` and move it over, so that a crash never leaves half a file."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(temporary, path)


def _write(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: str) -> None:
    temporary = f"{path}.tmp"
    try:
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        kept = f"The previous checkpoint {path} is untouched" if os.path.exists(path) else "There is no earlier one"
        raise CheckpointError(
            f"The checkpoint {path} could not be written: {error}. {kept}. Free some disk space and resume with "
            "--model_resume_path."
        ) from error


def _read(path: str, device: torch.device | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
            header = json.loads((file.metadata() or {}).get("state", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read ({error}). It is damaged, or was written by Ludwig without this "
            "plugin; such a run cannot be resumed. Start a new run, with adapter.pretrained_adapter_weights set to "
            "the old run's model/model_weights folder if that holds an adapter."
        ) from error
    if header.get("format") != FORMAT:
        raise CheckpointError(f"The file {path} is not a training checkpoint of this plugin.")
    return tensors, header


def _load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: str) -> None:
    """Copy `weights` into the trained parameters; both must be the same set with the same shapes."""
    parameters = trained_parameters(model)
    missing, foreign = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
    wrong = [name for name in parameters.keys() & weights.keys() if parameters[name].shape != weights[name].shape]
    if missing or foreign or wrong:
        example = (missing + foreign + wrong)[0]
        raise CheckpointError(
            f"The checkpoint {path} does not fit this model: {len(missing)} trained parameters are not in it, "
            f"{len(foreign)} of its own are not trained here and {len(wrong)} have another shape (first: {example}). "
            "Resume with the config of the run that wrote it."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Separate an optimiser's state into tensors (by index and names, `0/exp_avg`) and JSON.

    The 8-bit optimisers of bitsandbytes keep some of theirs one dictionary deeper.
    """
    tensors: dict[str, torch.Tensor] = {}

    def split(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[OPTIMIZER + path] = value
            return None
        if isinstance(value, dict):
            inner = {str(name): split(entry, f"{path}/{name}") for name, entry in value.items()}
            return {name: entry for name, entry in inner.items() if entry is not None}
        return value

    values = {str(index): split(entries, str(index)) for index, entries in state["state"].items()}
    return tensors, {"values": values, "param_groups": state["param_groups"]}


def _join_optimizer(tensors: dict[str, torch.Tensor], saved: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in saved["values"].items()}
    for name, tensor in tensors.items():
        if name.startswith(OPTIMIZER):
            index, *path, last = name[len(OPTIMIZER) :].split("/")
            entries = state.setdefault(int(index), {})
            for key in path:
                entries = entries.setdefault(key, {})
            entries[last] = tensor
    return {"state": state, "param_groups": saved["param_groups"]}
