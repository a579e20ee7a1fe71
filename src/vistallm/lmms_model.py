"""Our model in lmms-eval: `--model vistallm --model_args pretrained=RUN`; needs the extra `vistallm[lmms]`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from vistallm.api import Answer, AnswerRegion, VistaLLM
from vistallm.tasks import TASKS


class LmmsModel(lmms):
    """Greedy answers; regions as JSON lists in shares of width and height, words as they are."""

    def __init__(self, pretrained: str, device: str | None = None, batch_size: int | str = 8, **_: Any) -> None:
        super().__init__()
        self.model, self.size = VistaLLM.from_pretrained(pretrained, device), int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer in batches of one form; the documents of our own tasks say which (`task`), others leave it open."""
        texts, forms = [""] * len(requests), dict[str | None, list[int]]()
        docs = [self.task_dict[one.args[4]][one.args[5]][one.args[3]] for one in requests]
        for number, doc in enumerate(docs):
            form = doc.get("task")
            forms.setdefault(form if form in TASKS else None, []).append(number)
        for form, numbers in forms.items():
            for batch in (numbers[first : first + self.size] for first in range(0, len(numbers), self.size)):
                images = [requests[n].args[2](docs[n]) for n in batch]
                answers = self.model.predict(images, [requests[n].args[0] for n in batch], task=form)
                for number, answer in zip(batch, answers, strict=True):
                    texts[number] = as_text(answer)
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered; raises NotImplementedError."""
        raise NotImplementedError("vistallm generates answers; choose tasks of output_type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered; raises NotImplementedError."""
        raise NotImplementedError("vistallm answers one round; choose other tasks")


def as_text(answer: Answer) -> str:
    """An answer as lmms-eval takes it: a JSON list of boxes or polygons, or its words."""
    if answer.kind == "text" or answer.failure:
        return answer.text
    return json.dumps([shape for region in answer.regions for shape in _shapes(region)])


def _shapes(region: AnswerRegion) -> list[Any]:
    points = region.polygons if region.kind == "mask" else [np.reshape(np.array(region.box or region.point), (-1, 2))]
    shares = [(one / (region.width, region.height)).round(5).tolist() for one in points or []]
    return shares if region.kind == "mask" else [sum(one, []) for one in shares]
