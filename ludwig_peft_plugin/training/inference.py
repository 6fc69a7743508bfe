"""The trainer of `trainer.type: none`: it evaluates and trains nothing."""

from __future__ import annotations

from typing import Any

from ludwig.data.dataset.base import Dataset
from ludwig.trainers.trainer_llm import InferenceOnlyTrainer
from ludwig.utils.trainer_utils import append_metrics

from ludwig_peft_plugin.evaluation.predictor import PeftPredictor


class PeftInferenceTrainer(InferenceOnlyTrainer):
    """Evaluates each split once."""

    def __init__(self, config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, model, *args, **kwargs)
        model.initialize_adapter()

    def evaluation(
        self, dataset: Dataset, dataset_name: str, metrics_log: Any, batch_size: int, progress_tracker: Any
    ) -> Any:
        """Evaluate the loss and accuracies of the base (or of the given adapter) on `dataset`."""
        predictor = PeftPredictor(self.model, batch_size=batch_size, report_tqdm_to_ray=self.report_tqdm_to_ray)
        metrics, _ = predictor.batch_evaluation(dataset, collect_predictions=False, dataset_name=dataset_name)
        return append_metrics(self.model, dataset_name, metrics, metrics_log, progress_tracker)
