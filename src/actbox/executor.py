"""Containers and executors over a workspace: sessions with skills, a private folder, and saved images."""

from __future__ import annotations

import asyncio
import os
import secrets
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from actbox.client import Execution, ExecutionClient
from actbox.container import ExecutionContainer
from actbox.copies import Copy, KernelRefused
from actbox.dotenv import dotenv_variables
from actbox.errors import ForkRefused, InvalidArgument
from actbox.files import ImageFolder, replace_file
from actbox.history import History
from actbox.kept_files import KeptFiles, keep_folder, put_back
from actbox.logger import Logger
from actbox.notebook import make_notebook, notebook_bytes
from actbox.records import entry
from actbox.skills import find_skills, skill_sources
from actbox.spec import DEFAULT_TAG, MIB, Bind, bind_target, check_key
from actbox.work_folder import WorkFolder
from actbox.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Iterable, Mapping

    from actbox.checkpoint import Checkpoint
    from actbox.egress import Record
    from actbox.forks import Step
    from actbox.network import Network
    from actbox.saving import SessionState
    from actbox.skills import Skill, SkillFolder
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

    def make_client(self, key: str | None, recover: bool) -> ExecutionClient:  # noqa: FBT001 - a `Keeper`'s
        """See `ExecutionContainer.make_client`."""
        if key is None:
            return ExecutionClient(self.port, recover=recover)
        return CodeExecutor(key, self._workspace, self.port, recover=recover)


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
        super().__init__(*args, **kwargs)
        self._images = ImageFolder(self.images_dir)
        self._place = self.fresh_place()

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
                disk can, below `.branches` there; `working_dir` says where. It is removed when the last that works
                there is disconnected: the branch, and forks of it. It keeps branches out of each other's way, not
                out of each other's reach.
            force: see there.
            timeout: see there; a folder that is not copied by then is given up, and so is the branch.

        Raises:
            InvalidKey: the key cannot be used.
            InvalidArgument: `files` is something else.
            ProtocolError: the copy broke the rules of the wire; the session itself goes on.
            WorkspaceError: a folder of the key's cannot be used.
        """
        if files not in ("shared", "copy"):
            raise InvalidArgument("files", files, 'pass "shared" or "copy"')
        if key is not None:
            self._workspace.prepare_key(key)

        async def prepare(branch: Self, made: Copy) -> None:
            if key is not None:
                branch._key = key
                branch._images = ImageFolder(branch.images_dir)
            if files == "copy":
                await branch._move_into_copy(made)

        async def fork(step: Step) -> Self:
            branch = await self._fork(step, force=force, prepare=prepare)
            await self._note("session forked", branch=branch.key, files=files)
            return branch

        return await self.in_turn(timeout, fork)

    async def _move_into_copy(self, made: Copy) -> None:
        name = secrets.token_hex(8)
        # It is this branch's from now on, so that what is there of it goes with it, whatever becomes of the copying.
        await self.work_in(self._folder_of(self._folder.key, name))
        try:
            await made.ask({"type": "settle", "name": name})
        except KernelRefused as exc:
            raise ForkRefused(exc.reason("FolderRefused")) from exc

    def make_branch(self, of: Copy) -> Self:
        """See `ExecutionClient.make_branch`."""
        made = super().make_branch(of)
        made._history = self._history.branch()  # noqa: SLF001 - one of its own kind
        made._history.mark("Here the session was forked: the cells above ran in the one that it comes from.")  # noqa: SLF001
        return made

    def fresh_place(self) -> WorkFolder:
        """See `ExecutionClient.fresh_place`. A branch that has lost its kernel gets one in the folder of its key."""
        return self._folder_of(self._key)

    def _folder_of(self, key: str, copy: str | None = None) -> WorkFolder:
        return WorkFolder(self._workspace.private_skills_path, f"/app/{PRIVATE}", key, copy)

    @property
    def _folder(self) -> WorkFolder:
        assert self._place is not None  # noqa: S101 - `fresh_place` always gives one
        return self._place

    async def checkpoint(
        self, name: str, *, files: bool = False, force: bool = False, timeout: float = 120
    ) -> Checkpoint:
        """Keep the session as it is now; see `ExecutionClient.checkpoint`, whose errors these are too.

        Args:
            name: see there.
            files: keep the private folder with it, in a file of the host's that has no name, up to about `Limits.disk`;
                `rollback` then puts it back as it was. Symbolic links are left out, and named.
            force: see there.
            timeout: see there; files that are not kept by then are given up, and so is the checkpoint.

        Raises:
            TransferRefused: the folder cannot be copied.
            LocalPathError: nor be kept here.
            ProtocolError: what the copy sends is no folder; the session itself goes on.
        """
        self._checkpoints.check_name(name)

        async def keep(made: Copy) -> KeptFiles:
            return await keep_folder(made, self._folder.inside)

        async def park(step: Step) -> Checkpoint:
            checkpoint = await self._park(step, name, force=force, keep=keep if files else None)
            await self._note("checkpoint kept", checkpoint=name, cell=checkpoint.cell, files=files)
            return checkpoint

        return await self.in_turn(timeout, park)

    async def rollback(self, name: str, *, timeout: float = 120) -> Checkpoint:
        """Go back to a checkpoint; see `ExecutionClient.rollback`, whose errors these are too.

        Files that were kept with it are put back before anything else changes. If that fails the session goes on as it
        is, the folder may be half done, and the checkpoint is still there to be tried again.

        Raises:
            TransferRefused, ProtocolError: the folder could not be made what it was.
            LocalPathError: what was kept cannot be read here any more.
            LimitExceeded: (`disk`, `files`) too.
        """
        return await super().rollback(name, timeout=timeout)

    async def restore(self, path: str | Path, timeout: float = 120) -> SessionState:
        """See `ExecutionClient.restore`."""
        state = await super().restore(path, timeout)
        self._history.mark(
            "Here a saved session was restored: its variables are there without the cells that made them."
        )
        return state

    async def note_rollback(self, checkpoint: Checkpoint) -> None:
        """See `ExecutionClient.note_rollback`."""
        self._history.mark(f"Here the session went back to its state after cell {checkpoint.cell}.")
        words = f"session rolled back to its state after cell {checkpoint.cell}"
        await self._note(words, checkpoint=checkpoint.name, cell=checkpoint.cell, files=checkpoint.files)

    async def restore_files(self, made: Copy, files: KeptFiles) -> None:
        """See `ExecutionClient.restore_files`."""
        await put_back(made, files, (made.place or self._folder).inside)

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
        return self._folder.path

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
        """The skills that this session can use, of the folder that it works in; see `Workspace.skills`."""
        return await asyncio.to_thread(
            lambda: [skill for folder in self._skill_folders() for skill in find_skills(folder)]
        )

    async def skill_sources(self, names: Iterable[str]) -> str:
        """Skills of this session as Markdown for a prompt; see `Workspace.skill_sources`."""
        wanted = [names] if isinstance(names, str) else list(names)
        return await asyncio.to_thread(lambda: skill_sources(self._skill_folders(), wanted))

    def _skill_folders(self) -> list[SkillFolder]:
        return self._workspace.skill_folders(*self._folder.below)

    async def submit(self, code: str) -> Execution:
        """See `ExecutionClient.submit`."""
        execution = await super().submit(code)
        self._history.add(execution)
        return execution

    def notebook(self) -> dict[str, Any]:
        """The session so far, or until its end, as an executed Jupyter notebook: nbformat 4.5, as JSON values.

        Every cell that was submitted is there with its outputs; its metadata tell how it ended (`actbox`) and when it
        ran (`execution`). A cell that ended badly has an error output that says how, and a line stands where the kernel
        was a fresh one, the session went back to a checkpoint, was forked (the cells before that are those of the one
        it comes from), or a saved one was restored (whose cells are not known). What went beyond `history` is said to
        be missing. Values given by `set`, and files, are no cells.
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
        folder = self._folder
        return f"{folder.inside}/{folder.texts.save(text)}"

    async def note_end(self, execution: Execution) -> None:
        """See `ExecutionClient.note_end`."""
        if self._logger is not None and execution.outcome is not None:
            message, facts = entry(execution, execution.outcome)
            await self._note(message, **facts)

    async def _note(self, message: str, **facts: Any) -> None:
        if self._logger is not None:
            await self._logger.log(message, {"key": self._key, **facts})


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
