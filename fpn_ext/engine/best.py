"""The best checkpoint by a metric, and early stopping on that metric."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..data.digest import data_digest
from ..keys import declare, own_keys
from ..names import did_you_mean

declare(
    "TEST.FPN_EXT.BEST_METRIC",
    "",
    'The score, e.g. "bbox/AP", by which evaluations find what goes to model_best.pth; "" '
    "for none.",
    "training",
)
declare(
    "TEST.FPN_EXT.BEST_MODE",
    "max",
    'Which BEST_METRIC is better: "max" or "min".',
    "training",
)
declare(
    "TEST.FPN_EXT.EARLY_STOP_PATIENCE",
    0,
    "Evaluations in a row without a better BEST_METRIC after which training ends; 0 for never. "
    "Counting starts at the first score above 0 (with BEST_MODE min, at the first score).",
    "training",
)

logger = logging.getLogger(__name__)


class BestCheckpoint(EvalHook):
    """Detectron2's EvalHook that saves the best model so far and counts evaluations without gain.

    The best score and the count are part of the training state. A checkpoint is written before the
    evaluation at the same iteration; resuming from it starts with that evaluation, so a kill in
    between loses no score.

    Args:
        period: iterations between evaluations.
        evaluate: returns nested scores like ``Trainer.test``; called in all processes.
        save: writes the evaluated model, plus the extra entries it is given.
        metric: its name among the scores, e.g. ``"bbox/AP"``.
        mode: ``"max"`` or ``"min"``: which is better.
        patience: consecutive evaluations without a better score before stopping; 0 for never.
            Counting starts at the first score; with ``"max"`` at the first one other than 0, which
            is what a detector scores before it finds anything. NaN is not a score.
        data: a digest of what is scored on; scores of other data are not compared.

    Raises:
        ValueError: in the first evaluation, if no score has that name.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], dict[str, Any]],
        save: Callable[..., None],
        metric: str,
        mode: str = "max",
        patience: int = 0,
        data: str = "",
    ):
        super().__init__(period, self._evaluate)
        self.period = period
        self.evaluate = evaluate
        self.save = save
        self.metric = metric
        self.mode = mode
        self.patience = patience
        self.data = data
        self.best: float | None = None
        self.best_iteration = 0
        self.num_worse = 0
        self._evaluated_at = -1
        self._missed = False

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.num_worse

    def __str__(self) -> str:
        return (
            f"{self.metric} was no better than {self.best} of iteration {self.best_iteration} in "
            f"{self.num_worse} evaluations (TEST.FPN_EXT.EARLY_STOP_PATIENCE {self.patience})"
        )

    def before_train(self) -> None:
        if not self._missed:
            return
        logger.info("beginning with the evaluation that was to follow the checkpoint")
        trainer, iteration = self.trainer, self.trainer.iter
        trainer.iter = trainer.storage.iter = iteration - 1
        self._do_eval()
        trainer.iter = trainer.storage.iter = iteration
        self._missed = False

    def _do_eval(self) -> None:
        # An early stop comes after the evaluation of its iteration, and EvalHook evaluates after
        # training as well.
        if self._evaluated_at != self._iterations_done():
            super()._do_eval()

    def _evaluate(self) -> dict[str, Any]:
        results = self.evaluate()
        # Only the main process has scores; all need to know whether to stop.
        scores = comm.all_gather(flatten_results_dict(results or {}))[0]
        if self.metric not in scores:
            raise ValueError(
                f"TEST.FPN_EXT.BEST_METRIC: no score of this evaluation is named {self.metric!r}; "
                f"{did_you_mean(self.metric, scores)}. All: {', '.join(sorted(scores))}"
            )
        self._evaluated_at = self._iterations_done()
        self._compare(float(scores[self.metric]))
        return results

    def _compare(self, score: float) -> None:
        if self._is_better(score):
            logger.info("%s %.5g is the best so far (before: %s)", self.metric, score, self.best)
            self.best, self.best_iteration = score, self._evaluated_at
            self.num_worse = 0
            what = {"metric": self.metric, "score": score, "iteration": self._evaluated_at}
            self.save(best=what)
            return
        self.num_worse += self._counting
        logger.info(
            "%s %.5g is no better than %s of iteration %d (%d evaluations without a better one)",
            self.metric,
            score,
            self.best,
            self.best_iteration,
            self.num_worse,
        )

    @property
    def _counting(self) -> bool:
        return self.best is not None and (self.mode == "min" or self.best != 0)

    def _is_better(self, score: float) -> bool:
        if self.best is None or not math.isfinite(score):
            return math.isfinite(score)
        return score > self.best if self.mode == "max" else score < self.best

    def _iterations_done(self) -> int:
        # After training, trainer.iter is already the number of iterations.
        return min(self.trainer.iter + 1, self.trainer.max_iter)

    def state_dict(self) -> dict[str, Any]:
        done = self._iterations_done()
        due = done % self.period == 0 or done == self.trainer.max_iter
        return {
            "metric": self.metric,
            "mode": self.mode,
            "data": self.data,
            "best": self.best,
            "best_iteration": self.best_iteration,
            "num_worse": self.num_worse,
            "missed": due and self._evaluated_at != done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._missed = state["missed"]
        if (state["metric"], state["mode"]) != (self.metric, self.mode):
            logger.warning(
                "TEST.FPN_EXT.BEST_METRIC was %s (%s) and is %s (%s): looking for the best anew",
                state["metric"],
                state["mode"],
                self.metric,
                self.mode,
            )
            return
        if state.get("data", self.data) != self.data:
            logger.warning(
                "the data scored on (DATASETS.TEST) changed since the checkpoint, whose best %s "
                "was %s: looking for the best anew",
                self.metric,
                state["best"],
            )
            self._missed = True  # the score of the weights resumed from, on these data
            return
        self.best, self.best_iteration = state["best"], state["best_iteration"]
        self.num_worse = state["num_worse"]


def build_best_checkpoint(
    cfg: CfgNode, evaluate: Callable[[], dict[str, Any]], save: Callable[..., None]
) -> BestCheckpoint | None:
    """The hook configured by ``BEST_METRIC``, ``BEST_MODE``, ``EARLY_STOP_PATIENCE``, if any."""
    keys = own_keys(cfg, "TEST")
    if not keys.BEST_METRIC:
        return None
    how = keys.BEST_METRIC, keys.BEST_MODE, keys.EARLY_STOP_PATIENCE
    return BestCheckpoint(cfg.TEST.EVAL_PERIOD, evaluate, save, *how, data=_scored_on(cfg))


def _scored_on(cfg: CfgNode) -> str:
    """A digest of the datasets of DATASETS.TEST."""
    digests = []
    for name in cfg.DATASETS.TEST:
        records = DatasetCatalog.get(name)  # before its classes, which COCO's files name
        digests.append(data_digest(records, MetadataCatalog.get(name).get("thing_classes") or ()))
    return " ".join(digests)


class StopTraining(BaseException):
    """Ends training in :func:`stoppable`. Not an Exception: Detectron2 logs those as errors."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A block that :class:`StopTraining` exits normally, logging the reason.

    Around Detectron2's ``TrainerBase.train``, set the trainer's ``iter`` and ``max_iter`` to the
    number of completed iterations before raising it, so that the hooks' ``after_train`` sees a
    finished training.

    >>> with stoppable():
    ...     raise StopTraining("no better for 5 evaluations")
    """
    try:
        yield
    except StopTraining as stop:
        logger.info("%s", stop)
