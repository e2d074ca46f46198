"""Names of the GenAI semantic conventions of OpenTelemetry, and our own beside them.

The conventions are in development and live in their own repository (semantic-conventions-genai);
these are the names of opentelemetry-semantic-conventions 0.66b2, which a test compares. `plan` is
an operation of the newer repository. Nothing else in `app/` spells a name of a span attribute.
"""

from __future__ import annotations

from typing import Final

OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
TOOL_NAME: Final = "gen_ai.tool.name"
WORKFLOW_NAME: Final = "gen_ai.workflow.name"
ERROR_TYPE: Final = "error.type"

INVOKE_WORKFLOW: Final = "invoke_workflow"
PLAN: Final = "plan"
EXECUTE_TOOL: Final = "execute_tool"
CHAT: Final = "chat"
VERIFY: Final = "verify"
"""Not of the conventions: a value was held against its contract."""

RUN_ID: Final = "flexrun.run.id"
RUN_STATUS: Final = "flexrun.run.status"
LANE: Final = "flexrun.run.lane"
TAKEOVERS: Final = "flexrun.run.takeovers"
PLAN_VERSION: Final = "flexrun.plan.version"
PLAN_AUTHOR: Final = "flexrun.plan.author"
PLAN_NODES: Final = "flexrun.plan.nodes"
NODE_ID: Final = "flexrun.node.id"
ATTEMPT: Final = "flexrun.node.attempt"
SCOPE: Final = "flexrun.verify.scope"
FAULTS: Final = "flexrun.verify.faults"
OUTCOME: Final = "flexrun.outcome"
COST_USD: Final = "flexrun.cost.usd"
IS_ESTIMATED: Final = "flexrun.usage.is_estimated"
