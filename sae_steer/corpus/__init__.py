"""The corpus: tasks and plans in two renderings, user texts, the tokenizer, onsets and target tokens."""

from sae_steer.corpus.grammar import tasks, write_plans
from sae_steer.corpus.plans import SPECIALS, VARIANTS, ParsedPlan, Plan, Step, Task, parse_plan
from sae_steer.corpus.regulation import LENIENT_KEYWORDS, REGULATION_PHRASES, is_lenient, is_target

__all__ = [
    "LENIENT_KEYWORDS",
    "REGULATION_PHRASES",
    "SPECIALS",
    "VARIANTS",
    "ParsedPlan",
    "Plan",
    "Step",
    "Task",
    "is_lenient",
    "is_target",
    "parse_plan",
    "tasks",
    "write_plans",
]
