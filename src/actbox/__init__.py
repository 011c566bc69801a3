"""actbox: a stateful, sandboxed, quick Python session for AI agents.

The six names of `actbox.executor` are those of its ancestor; see the README for what differs.
"""

from actbox.attached import AttachedClient, AttachedExecution
from actbox.blocks import Block, ImageBlock, OutputPolicy, TextBlock, to_anthropic, to_openai
from actbox.callee import Allow, CallLimits, Deny, FunctionCall
from actbox.checkpoint import Checkpoint
from actbox.client import ExecutionClient
from actbox.container import ExecutionContainer
from actbox.doctor import Layer, examine
from actbox.dotenv import dotenv_variables
from actbox.engines import (
    ContainerInfo,
    build_environment,
    build_image,
    list_containers,
    prune_containers,
)
from actbox.engines import known as environments
from actbox.errors import (
    ActboxError,
    CheckpointMissing,
    ConnectionError,
    DotenvError,
    DriveRefused,
    EnvironmentBuildError,
    EnvironmentNotFound,
    EnvironmentUnusable,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionLost,
    ExecutionTimeout,
    ExecutionUnknown,
    ForkRefused,
    InvalidArgument,
    InvalidKey,
    KernelDied,
    LimitExceeded,
    LocalPathError,
    LocalPathMissing,
    McpServerError,
    McpServerTimeout,
    PortInUse,
    ProtocolError,
    SandboxUnavailable,
    SessionBroken,
    SessionGone,
    StateError,
    StateRefused,
    StillRunning,
    TransferRefused,
    VariableMissing,
    VariableRefused,
    VariableUnsupported,
    WorkspaceError,
)
from actbox.events import CallRecord
from actbox.execution import Execution
from actbox.executor import (
    CodeExecutionContainer,
    CodeExecutionEnvironment,
    CodeExecutor,
    execution_environment,
)
from actbox.journal import Dropped
from actbox.lines import Standing
from actbox.logger import Logger
from actbox.mcp import McpMount
from actbox.network import Network
from actbox.outputs import Image, Output
from actbox.result import ExecutionResult
from actbox.saving import SessionState
from actbox.skills import Skill, SkillProblem
from actbox.spec import Limits
from actbox.variables import Variable
from actbox.workspace import Workspace

__version__ = "0.1.0"

__all__ = [
    "ActboxError",
    "Allow",
    "AttachedClient",
    "AttachedExecution",
    "Block",
    "CallLimits",
    "CallRecord",
    "Checkpoint",
    "CheckpointMissing",
    "CodeExecutionContainer",
    "CodeExecutionEnvironment",
    "CodeExecutor",
    "ConnectionError",
    "ContainerInfo",
    "Deny",
    "DotenvError",
    "DriveRefused",
    "Dropped",
    "EnvironmentBuildError",
    "EnvironmentNotFound",
    "EnvironmentUnusable",
    "Execution",
    "ExecutionClient",
    "ExecutionContainer",
    "ExecutionError",
    "ExecutionInterrupted",
    "ExecutionLost",
    "ExecutionResult",
    "ExecutionTimeout",
    "ExecutionUnknown",
    "ForkRefused",
    "FunctionCall",
    "Image",
    "ImageBlock",
    "InvalidArgument",
    "InvalidKey",
    "KernelDied",
    "Layer",
    "LimitExceeded",
    "Limits",
    "LocalPathError",
    "LocalPathMissing",
    "Logger",
    "McpMount",
    "McpServerError",
    "McpServerTimeout",
    "Network",
    "Output",
    "OutputPolicy",
    "PortInUse",
    "ProtocolError",
    "SandboxUnavailable",
    "SessionBroken",
    "SessionGone",
    "SessionState",
    "Skill",
    "SkillProblem",
    "Standing",
    "StateError",
    "StateRefused",
    "StillRunning",
    "TextBlock",
    "TransferRefused",
    "Variable",
    "VariableMissing",
    "VariableRefused",
    "VariableUnsupported",
    "Workspace",
    "WorkspaceError",
    "__version__",
    "build_environment",
    "build_image",
    "dotenv_variables",
    "environments",
    "examine",
    "execution_environment",
    "list_containers",
    "prune_containers",
    "to_anthropic",
    "to_openai",
]
