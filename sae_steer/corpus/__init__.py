"""The corpus: tasks and plans in two renderings, user texts, the tokenizer, onsets and target tokens."""

from sae_steer.corpus.grammar import tasks, write_plans
from sae_steer.corpus.labels import (
    OnsetRule,
    Onsets,
    TargetTokens,
    count_first_tokens,
    first_token_purity,
    label_positions,
)
from sae_steer.corpus.plans import SPECIALS, VARIANTS, ParsedPlan, Plan, Step, Task, parse_plan
from sae_steer.corpus.regulation import LENIENT_KEYWORDS, REGULATION_PHRASES, is_lenient, is_target, phrase_patterns
from sae_steer.corpus.spans import TokenizedText
from sae_steer.corpus.texts import UserText, read_texts
from sae_steer.corpus.tokenizer import PlanTokenizer

__all__ = [
    "LENIENT_KEYWORDS",
    "REGULATION_PHRASES",
    "SPECIALS",
    "VARIANTS",
    "OnsetRule",
    "Onsets",
    "ParsedPlan",
    "Plan",
    "PlanTokenizer",
    "Step",
    "TargetTokens",
    "Task",
    "TokenizedText",
    "UserText",
    "count_first_tokens",
    "first_token_purity",
    "is_lenient",
    "is_target",
    "label_positions",
    "parse_plan",
    "phrase_patterns",
    "read_texts",
    "tasks",
    "write_plans",
]
