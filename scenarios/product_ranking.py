"""Product ranking: which of several rows describes the same product? Entity matching as a ranking.

Run entries: ``product_ranking``, ``product_ranking:seed=7``. Own data: ``product_ranking:data=rows.jsonl``
with the columns ``input``, ``choices`` and ``output`` (the right choice).

HELM asks whether each candidate is the same, Yes or No (its ``ranking_binary`` method), and the metric here
orders the candidates by answer and probability. HELM's own ranking metrics need pytrec_eval, which has to be
compiled.
"""

from __future__ import annotations

from typing import Any

from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.common_adapter_specs import get_ranking_binary_adapter_spec
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.metrics.common_metric_specs import get_generic_metric_specs
from helm.benchmark.metrics.metric import MetricSpec
from helm.benchmark.metrics.metric_name import MetricName
from helm.benchmark.metrics.metric_service import MetricService
from helm.benchmark.metrics.reference_metric import ReferenceMetric
from helm.benchmark.metrics.statistic import Stat
from helm.benchmark.run_spec import RunSpec

from scenarios.task_scenario import Source, TaskScenario, make_run_spec
from scenarios.tasks import PRODUCT_RANKING


class ProductRankingScenario(TaskScenario):
    """Each instance is a product row; its references are three candidate rows, one of which is right."""

    name = "product_ranking"
    description = "Rank table rows by whether they describe the same product as a given row."
    tags = ["entity_matching", "ranking", "back_office"]
    task = PRODUCT_RANKING

    @classmethod
    def run_spec(cls, **arguments: Any) -> RunSpec:
        """Run entry ``product_ranking``; raises UsageError for an unknown argument."""
        source = Source.parse(cls.name, arguments).changed()
        adapter = get_ranking_binary_adapter_spec(
            instructions=PRODUCT_RANKING.layout.instructions,
            document_noun="Product A",
            query_noun="Product B",
            output_prefix="Are A and B the same?",
            max_train_instances=2 * PRODUCT_RANKING.layout.shots,
            max_tokens=PRODUCT_RANKING.layout.max_tokens,
            stop_sequences=["\n"],
        )
        metric = MetricSpec(f"{RankOfCorrectMetric.__module__}.{RankOfCorrectMetric.__qualname__}")
        metrics = [metric, *get_generic_metric_specs()]
        return make_run_spec(cls, source, source | {"require_choices": True}, adapter, metrics)


class RankOfCorrectMetric(ReferenceMetric):
    """``exact_match`` (the right candidate comes first) and ``reciprocal_rank`` of each instance.

    Candidates answered Yes come first, then those answered No, then the others; a more probable Yes and a
    less probable No come earlier, as in HELM's ``RankingMetric``.
    """

    def evaluate_references(
        self,
        adapter_spec: AdapterSpec,
        reference_request_states: list[RequestState],
        metric_service: MetricService,
        eval_cache_path: str,
    ) -> list[Stat]:
        """The statistics of one instance, from the answers to all its candidates."""
        ranked = sorted(reference_request_states, key=_score, reverse=True)
        references = reference_request_states[0].instance.references
        rank = 1 + next(i for i, s in enumerate(ranked) if references[s.reference_index or 0].is_correct)
        return [
            Stat(MetricName("exact_match")).add(float(rank == 1)),
            Stat(MetricName("reciprocal_rank")).add(1 / rank),
        ]


def _score(state: RequestState) -> tuple[int, float]:
    assert state.result is not None, "metrics run after execution"
    completion = state.result.completions[0]
    answer = completion.text.strip().lower()
    if answer == "yes":
        return 2, completion.logprob
    return (1 if answer == "no" else 0), -completion.logprob
