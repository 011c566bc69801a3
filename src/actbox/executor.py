"""Containers and executors over a workspace: sessions with skills, a private folder, and saved images."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from actbox.client import Execution, ExecutionClient
from actbox.container import ExecutionContainer
from actbox.dotenv import dotenv_variables
from actbox.errors import InvalidArgument
from actbox.events import Died, Exceeded, Failed, Finished, Interrupted, Lost, Outcome, TimedOut
from actbox.files import ImageFolder, TextFolder, remove_folder, replace_file
from actbox.forks import Checkpoint, Copy, Files
from actbox.guest.folders import BRANCHES
from actbox.history import History
from actbox.logger import Logger
from actbox.notebook import make_notebook, notebook_bytes
from actbox.outputs import strip_ansi
from actbox.shielded import in_thread
from actbox.spec import DEFAULT_TAG, MIB, Bind, bind_target, check_key
from actbox.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Iterable, Mapping

    from actbox.egress import Record
    from actbox.network import Network
    from actbox.sessions import Session
    from actbox.skills import Skill
    from actbox.spec import Limits

__all__ = [
    "CodeExecutionContainer",
    "CodeExecutionEnvironment",
    "CodeExecutor",
    "Workspace",
    "dotenv_variables",
    "execution_environment",
]

SHARED = "skills/shared"
PRIVATE = "skills/private"
_LOGGED_CHARACTERS = 10_000
# A private folder may hold gigabytes.
_FILES_SECONDS = 600.0


class CodeExecutionContainer(ExecutionContainer):
    """An `ExecutionContainer` over a workspace.

    Inside, `/app/skills/shared` holds the shared skills, read-only unless `readonly=()` is passed, and
    `/app/skills/private/{key}` the folder of the executor with that key, and of no other.

    Args:
        tag: see `ExecutionContainer`, as all arguments that are not listed here.
        workspace_path: the workspace's folder on the host, made when missing; "workspace" in the current folder by
            default.
        readonly: which of "skills/shared" and "skills/private" may not be written inside.

    Raises:
        WorkspaceError: (from `run`) the folder cannot be used, or holds symbolic links where none may be.
    """

    def __init__(
        self,
        tag: str = DEFAULT_TAG,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        show_pull_progress: bool = True,  # noqa: FBT001, FBT002 - the ancestor's signature
        workspace_path: str | Path | None = None,
        *,
        engine: str = "auto",
        limits: Limits | None = None,
        network: Network | None = None,
        preload: Collection[str] | None = None,
        readonly: Collection[str] = (SHARED,),
        runtime: str | None = None,
        separate: bool = False,
    ) -> None:
        self._workspace = Workspace(workspace_path if workspace_path is not None else Path("workspace"))
        super().__init__(
            tag,
            {str(self._workspace.shared_skills_path): SHARED, str(self._workspace.private_skills_path): PRIVATE},
            env,
            port,
            show_pull_progress,
            engine=engine,
            limits=limits,
            network=network,
            preload=preload,
            readonly=readonly,
            runtime=runtime,
            separate=separate,
        )

    def _make_binds(self, binds: Mapping[str, str] | None, readonly: Collection[str]) -> tuple[Bind, ...]:
        return tuple(
            Bind(bind.source, bind.target, readonly=bind.readonly, per_key=bind.target == bind_target(PRIVATE))
            for bind in super()._make_binds(binds, readonly)
        )

    @property
    def workspace(self) -> Workspace:
        """The workspace on the host."""
        return self._workspace

    def prepare_folders(self) -> None:
        """See `ExecutionContainer.prepare_folders`."""
        self._workspace.prepare()

    def prepare_key(self, key: str) -> None:
        """See `ExecutionContainer.prepare_key`."""
        self._workspace.prepare_key(key)

    def make_client(self, key: str | None) -> ExecutionClient:
        """See `ExecutionContainer.make_client`."""
        return ExecutionClient(self.port) if key is None else CodeExecutor(key, self._workspace, self.port)


class CodeExecutor(ExecutionClient):
    """An `ExecutionClient` with a key: skills, a working directory and a folder of images of its own.

    Images that cells produce are saved in `images_dir` under names that the host chooses; `result.images` says where.

    Args:
        key: names the executor's folders: 1 to 64 of A-Z, a-z, 0-9, '_' and '-', beginning with a letter or digit.
        workspace: the workspace of the container.
        args, kwargs: as of `ExecutionClient`: port, host, heartbeat_interval, token, interrupt_grace.
        logger: where each execution is recorded, if given.
        history: bytes of code and outputs that are remembered for `notebook`, in at most 1000 cells; what is older is
            forgotten, and 0 remembers nothing. Default 32 MiB.

    Raises:
        InvalidKey: the key cannot be used; nothing was touched.
    """

    def __init__(
        self,
        key: str,
        workspace: Workspace,
        *args: Any,
        logger: Logger | None = None,
        history: int = 32 * MIB,
        **kwargs: Any,
    ) -> None:
        self._key = check_key(key)
        if type(history) is not int or history < 0:
            raise InvalidArgument("history", history, "pass a number of bytes, or 0 to remember nothing")
        self._history = History(history)
        self._workspace = workspace
        self._logger = logger
        # Of a branch: whose folder it works in, and the name of its copy.
        self._folder = self._key
        self._copied: str | None = None
        self._owns_copy = False
        super().__init__(*args, **kwargs)
        self._images = ImageFolder(self.images_dir)
        self._texts = TextFolder(self.working_dir)

    async def connect(self) -> None:
        """Make the executor's folders, then connect; see `ExecutionClient.connect`.

        Raises:
            WorkspaceError: a folder cannot be used.
        """
        self._workspace.prepare_key(self._key)
        await super().connect()

    async def fork(
        self,
        key: str | None = None,
        *,
        files: Literal["shared", "copy"] = "shared",
        force: bool = False,
        timeout: float = 120,
    ) -> Self:
        """Copy the session; see `ExecutionClient.fork`, whose errors these are too.

        Args:
            key: the branch's own, for its images and the log, and for the fresh kernel that it gets if it loses this
                one; None for this executor's.
            files: "shared": it works in the same private folder. "copy": in a copy of that, made by reflink where the
                disk can, below `.branches` there; `working_dir` says where, and when the branch is disconnected it is
                removed. It keeps branches out of each other's way, not out of each other's reach.
            force: see there.
            timeout: see there.

        Raises:
            InvalidKey: the key cannot be used.
            InvalidArgument: `files` is something else.
            WorkspaceError: a folder of the key's cannot be used.
        """
        if files not in ("shared", "copy"):
            raise InvalidArgument("files", files, 'pass "shared" or "copy"')
        if key is not None:
            self._workspace.prepare_key(key)

        async def prepare(branch: Self) -> None:
            branch._become_branch(key)
            if files == "copy":
                name = secrets.token_hex(8)
                await branch.ask({"type": "settle", "name": name})
                branch._copied, branch._owns_copy = name, True
                branch._texts = TextFolder(branch.working_dir)

        return await self._do(timeout, lambda: self._fork(force=force, prepare=prepare))

    def _become_branch(self, key: str | None) -> None:
        self._owns_copy = False
        self._history = self._history.branch()
        if key is not None:
            self._key = check_key(key)
            self._images = ImageFolder(self.images_dir)

    async def disconnect(self) -> None:
        """See `ExecutionClient.disconnect`; of a branch that works in a copy of the folder, this removes it."""
        await super().disconnect()
        await self._leave_folder()

    async def open_session(self) -> Session:
        """See `ExecutionClient.open_session`. A branch that has lost its kernel gets one in the folder of its key."""
        session = await super().open_session()
        await self._leave_folder()
        return session

    async def _leave_folder(self) -> None:
        folder, name, self._folder, self._copied = self._folder, self._copied, self._key, None
        self._texts = TextFolder(self.working_dir)
        if name is not None and self._owns_copy:
            await in_thread(remove_folder, self._workspace.private_skills_path, folder, BRANCHES, name)

    async def checkpoint(
        self, name: str, *, files: bool = False, force: bool = False, timeout: float = 120
    ) -> Checkpoint:
        """Keep the session as it is now; see `ExecutionClient.checkpoint`, whose errors these are too.

        Args:
            name: see there.
            files: keep the private folder with it, on the host, up to `Limits.disk`; `rollback` then puts it back as it
                was. Symbolic links are left out, and named.
            force: see there.
            timeout: see there.

        Raises:
            TransferRefused: the folder cannot be copied.
            LocalPathError: nor be kept here.
        """
        self._checkpoints.check_name(name)
        save = self._save_files if files else None
        return await self._do(timeout, lambda: self._park(name, force=force, save=save))

    async def _save_files(self, made: Copy) -> Files:
        place = Path(await in_thread(tempfile.mkdtemp, prefix="actbox-checkpoint-"))
        try:
            twin = self._twin(made)
            most = made.session.limits.disk
            left_out = await twin.download_directory(
                self._inside, place / "files", _FILES_SECONDS, max_bytes=most, without=(BRANCHES,)
            )
            made.requests = twin._cell  # noqa: SLF001 - one of its own kind
        except BaseException:
            await in_thread(shutil.rmtree, place, ignore_errors=True)
            raise
        return Files(place, tuple(left_out))

    def note_rollback(self, checkpoint: Checkpoint) -> None:
        """See `ExecutionClient.note_rollback`."""
        self._history.mark(f"Here the session went back to its state after cell {checkpoint.cell}.")

    async def restore_files(self, made: Copy, files: Files) -> None:
        """See `ExecutionClient.restore_files`."""
        twin = self._twin(made)
        await twin.ask({"type": "clear"})
        await twin.upload_directory(self._inside, files.place / "files", _FILES_SECONDS)
        made.requests = twin._cell  # noqa: SLF001

    @property
    def _inside(self) -> str:
        """The private folder as the session sees it."""
        place = f"/app/{PRIVATE}/{self._folder}"
        return place if self._copied is None else f"{place}/{BRANCHES}/{self._copied}"

    @property
    def key(self) -> str:
        """The executor's key."""
        return self._key

    @property
    def workspace(self) -> Workspace:
        """The workspace."""
        return self._workspace

    @property
    def working_dir(self) -> Path:
        """The executor's private folder on the host; inside it is the working directory."""
        place = self._workspace.private_skills_path / self._folder
        return place if self._copied is None else place / BRANCHES / self._copied

    @property
    def images_dir(self) -> Path:
        """Where images are saved on the host. The guest does not see it."""
        return self._workspace.images_path / self._key

    @property
    def skill_paths(self) -> list[Path]:
        """The host folders whose modules are importable inside: shared, then private."""
        return [self._workspace.shared_skills_path, self.working_dir]

    @property
    def session_key(self) -> str | None:
        """See `ExecutionClient.session_key`."""
        return self._key

    def keep_image(self, data: bytes, mime_type: str) -> Path | None:
        """See `ExecutionClient.keep_image`."""
        return self._images.save(data, mime_type)

    async def skills(self) -> list[Skill]:
        """The skills that this session can use; see `Workspace.skills`."""
        return await asyncio.to_thread(self._workspace.skills, self._key)

    async def skill_sources(self, names: Iterable[str]) -> str:
        """Skills of this session as Markdown for a prompt; see `Workspace.skill_sources`."""
        return await asyncio.to_thread(self._workspace.skill_sources, names, self._key)

    async def submit(self, code: str) -> Execution:
        """See `ExecutionClient.submit`."""
        execution = await super().submit(code)
        self._history.add(execution)
        return execution

    def notebook(self) -> dict[str, Any]:
        """The session so far, or until its end, as an executed Jupyter notebook: nbformat 4.5, as JSON values.

        Every cell that was submitted is there with its outputs; its metadata tell how it ended (`actbox`) and when it
        ran (`execution`). A cell that ended badly has an error output that says how, and a line stands where the kernel
        was a fresh one. What went beyond `history` is said to be missing.
        """
        cells = self._history.entries()
        return make_notebook(cells, forgotten=self._history.forgotten, key=self._key, version=version("actbox"))

    async def save_notebook(self, path: str | Path) -> None:
        """Write `notebook()` to a file, which is replaced at once if it is there; its folder must be.

        Raises:
            LocalPathError: the file cannot be written. A folder of the workspace is not reached through a link.
        """
        await asyncio.to_thread(self._write_notebook, self.notebook(), path)

    def _write_notebook(self, notebook: dict[str, Any], place: str | Path) -> None:
        root, data = self._workspace.path, notebook_bytes(notebook)
        path = Path(os.path.normpath(Path(place).absolute()))
        if path.is_relative_to(root):
            replace_file(root, path.parent.relative_to(root).parts, path.name, data)
        else:
            replace_file(path.parent.resolve(), (), path.name, data)

    def keep_text(self, text: str) -> str | None:
        """See `ExecutionClient.keep_text`."""
        return f"{self._inside}/{self._texts.save(text)}"

    async def note_end(self, execution: Execution) -> None:
        """See `ExecutionClient.note_end`."""
        if self._logger is None or execution.outcome is None:
            return
        result = execution.so_far()
        metadata: dict[str, Any] = {
            "key": self._key,
            **_subject(execution),
            "outcome": type(execution.outcome).__name__,
            "seconds": round(result.duration, 4),
        }
        if isinstance(execution.outcome, Failed):
            error = execution.outcome.error
            metadata["error"] = strip_ansi(error.traceback)[-_LOGGED_CHARACTERS:] or f"{error.name}: {error.value}"
        if result.text:
            metadata["text"] = result.text[:_LOGGED_CHARACTERS]
        if result.images:
            metadata["images"] = [str(image.path) for image in result.images]
        if execution.restarted:
            metadata["restarted"] = True
        what = "cell" if execution.transfer is None else "transfer"
        await self._logger.log(describe(execution.outcome, what), metadata)


@dataclass
class CodeExecutionEnvironment:
    """A running container, an executor in it, and a logger."""

    container: CodeExecutionContainer
    executor: CodeExecutor
    logger: Logger


@asynccontextmanager
async def execution_environment(
    executor_key: str = "default",
    ipybox_tag: str = DEFAULT_TAG,
    env_vars: Mapping[str, str] | None = None,
    workspace_path: str | Path = Path("workspace"),
    log_file: str | Path | None = Path("logs", "agent.log"),
    *,
    engine: str = "auto",
    limits: Limits | None = None,
    network: Network | None = None,
    preload: Collection[str] | None = None,
    readonly: Collection[str] = (SHARED,),
    runtime: str | None = None,
    separate: bool = False,
) -> AsyncGenerator[CodeExecutionEnvironment]:
    """A container, an executor and a logger, in one context.

    Args:
        executor_key: the executor's key.
        ipybox_tag: the tag of the environment inside.
        env_vars: variables of the session's `os.environ`. None reads them from `.env` in the current folder, if there
            is one, when the context is entered, and exports them to this process too, as `dotenv_variables` does;
            pass `{}` to keep them out of the sandbox.
        workspace_path: see `CodeExecutionContainer`.
        log_file: see `Logger`.
        engine: see `CodeExecutionContainer`, as all that follow.
        limits: see there.
        network: see there.
        preload: see there.
        readonly: see there.
        runtime: see there.
        separate: see there.
    """
    env = dotenv_variables() if env_vars is None else env_vars
    async with (
        Logger(log_file) as logger,
        CodeExecutionContainer(
            tag=ipybox_tag,
            env=env,
            workspace_path=workspace_path,
            engine=engine,
            limits=limits,
            network=network,
            preload=preload,
            readonly=readonly,
            runtime=runtime,
            separate=separate,
        ) as container,
        _logging_egress(container, logger),
        CodeExecutor(executor_key, container.workspace, container.port, logger=logger) as executor,
    ):
        yield CodeExecutionEnvironment(container, executor, logger)


@asynccontextmanager
async def _logging_egress(container: CodeExecutionContainer, logger: Logger) -> AsyncGenerator[None]:
    """Have every connection that a session tries written to the log."""
    writing: set[asyncio.Task[None]] = set()

    def note(record: Record) -> None:
        task = asyncio.ensure_future(logger.log(f"connection {record.verdict}", asdict(record)))
        writing.add(task)
        task.add_done_callback(writing.discard)

    container.on_egress = note
    try:
        yield
    finally:
        if writing:
            await asyncio.wait(writing)


def _subject(execution: Execution) -> dict[str, Any]:
    """What an execution was about, for logs."""
    if execution.transfer is None:
        return {"code": execution.code}
    return {name: value for name, value in execution.transfer.request.items() if name != "id"}


def describe(outcome: Outcome, what: str = "cell") -> str:
    """An outcome in a few words, for logs."""
    match outcome:
        case Finished(count):
            return f"{what} {count} finished" if what == "cell" else f"{what} finished"
        case Failed(error, count):
            return f"{what} {count} failed: {error.name}" if what == "cell" else f"{what} failed"
        case Interrupted(state_kept):
            return f"{what} interrupted, state {'kept' if state_kept else 'lost'}"
        case Exceeded(overrun, state_kept):
            return f"cell went over the limit {overrun.limit}, state {'kept' if state_kept else 'lost'}"
        case TimedOut(timeout, state_kept):
            return f"{what} timed out after {timeout:g} s, state {'kept' if state_kept else 'lost'}"
        case Died():
            return "kernel died, state lost"
        case Lost():
            return "container lost"
