// A run seen from the launcher: starts the ranks, hears them, hands out jobs.

import { hostname } from 'node:os';
import { newRunId, Rendezvous, removeStale } from '../comm/bootstrap.js';
import { type Choice, chooseCollective } from '../comm/collective.js';
import { ControlServer } from '../comm/control.js';
import { keysOf, type RunKeys } from '../comm/curve.js';
import type { LauncherMessage, WorkerMessage } from '../comm/messages.js';
import { askRas, rasAddress } from '../comm/ras.js';
import { EXIT, fail, TpError } from '../errors.js';
import { log } from '../log.js';
import type { Cluster } from './cluster.js';
import { Deferred } from './deferred.js';
import { Execution, type OnStep } from './execution.js';
import { describeExit, describePlace, RankFailure, type RankState, writeReport } from './failure.js';
import { makeFolder } from './folder.js';
import { gpuFacts } from './gpus.js';
import { type Job, type JobResult, nameOf, type RunSpec } from './job.js';
import { LoadProgress } from './load-progress.js';
import { type LaunchHooks, startLocalRank } from './local.js';
import type { Exit, RankHandle } from './process.js';
import { isLeftBehind, newEntry, register, removeSharedMemory } from './registry.js';
import { interruptible } from './signals.js';
import { Supervisor } from './supervise.js';
import { Watchdog } from './watchdog.js';
import { parseReady, parseResult, type ReadyInfo, type Setup, sentSpec, unpackReport } from './wire.js';

/** A rank that has been told to stop may take this long before it is made to. */
const STOP_MS = 2000;
/** Between the end of a rank and the arrival of its last words, in ms. */
const WORDS_MS = 150;
/** NCCL's own report of a run that hangs is worth so much waiting, in ms. */
const RAS_MS = 1000;
/** Failures about which NCCL may know more than we do. */
const NCCL_KNOWS = ['TP_COLLECTIVE', 'TP_COLLECTIVE_TIMEOUT', 'TP_STAGE_TIMEOUT', 'TP_STEP_TIMEOUT'];

/** One rank of a run that is ready. */
export interface RankInfo extends ReadyInfo {
  rank: number;
  host: string;
  pid: number;
}

export interface Run {
  readonly collective: Choice;
  /** By rank. */
  readonly ranks: readonly RankInfo[];
  /**
   * Runs one job on every rank; results by rank. `onStep` gets each step once all ranks have reported it.
   * Rejects with the run's failure, after every process has gone.
   */
  execute(job: Job, onStep?: OnStep): Promise<JobResult[]>;
  /** Ends the ranks; safe to call twice and after a failure. */
  close(): Promise<void>;
}

/**
 * Starts `spec.ranks` workers and waits until all are ready. Throws what a worker found wrong with the input (exit
 * code 2), TP_STAGE_TIMEOUT, TP_WORKER_DIED, TP_NODE_LOST, TP_INTERRUPTED; no process is left then. With a `cluster` the
 * ranks fill its nodes in order.
 */
export async function launch(
  spec: RunSpec,
  hooks: LaunchHooks = {},
  cluster: Cluster | null = null,
): Promise<Run> {
  if (cluster) await interruptible(cluster.allPresent());
  const topology = { ...spec, hosts: cluster?.members.hosts(spec.ranks) ?? 1 };
  const collective = chooseCollective(spec.collective, topology, () => gpuFacts(hooks.env));
  log.info(`collective: ${collective.why}`);
  const launcher = new Launcher(spec, collective, hooks, cluster);
  await launcher.start();
  return launcher;
}

class Launcher implements Run {
  readonly collective: Choice;
  readonly ranks: RankInfo[] = [];
  readonly #spec: RunSpec;
  readonly #hooks: LaunchHooks;
  readonly #cluster: Cluster | null;
  readonly #keys: RunKeys | null;
  readonly #id = newRunId();
  readonly #states: RankState[] = [];
  readonly #supervisor = new Supervisor(this.#states, {
    run: this.#id,
    inquire: () => this.#inquire(),
    diagnose: (error) => this.#diagnose(error),
    cleanUp: () => this.#cleanUp(),
    onFailure: (report) => {
      if (this.#spec.logDir !== null) writeReport(this.#spec.logDir, report);
    },
  });
  readonly #ready = new Deferred<void>();
  readonly #endpoints = new Map<number, Record<string, string>>();
  readonly #loading = new LoadProgress();
  #rendezvous: Rendezvous | null = null;
  #server: ControlServer | null = null;
  #watchdog: Watchdog | null = null;
  #execution: Execution | null = null;
  #onAnswer: (() => void) | null = null;

  constructor(spec: RunSpec, collective: Choice, hooks: LaunchHooks, cluster: Cluster | null) {
    this.#spec = spec;
    this.collective = collective;
    this.#hooks = hooks;
    this.#cluster = cluster;
    this.#keys = cluster?.newKeys(spec.ranks) ?? null;
  }

  async start(): Promise<void> {
    try {
      this.#rendezvous = new Rendezvous();
      this.#register(); // whoever finds this folder left behind knows by whom
      if ((await removeStale(isLeftBehind)) > 0) removeSharedMemory();
      const { address } = this;
      const control = address === null ? this.#rendezvous.control : `tcp://${address}:*`;
      const keys = this.#keys && {
        own: this.#keys.launcher,
        clients: this.#keys.ranks.map(({ publicKey }) => publicKey),
      };
      this.#server = await ControlServer.bind(control, this.#id, this.#spec.ranks, keys);
      if (this.#supervisor.over) this.#cleanUp();
      else this.#startRanks(this.#server);
    } catch (error) {
      this.#supervisor.fail(error as Error);
    }
    await this.#supervisor.guard(this.#ready.promise);
    log.progress('');
  }

  async execute(job: Job, onStep: OnStep = () => {}): Promise<JobResult[]> {
    if (this.#execution) throw fail('TP_INTERNAL', 'a run does one job at a time');
    const execution = new Execution(this.#spec.ranks, onStep);
    this.#execution = execution;
    for (const state of this.#states) Object.assign(state, { job: job.kind, heardAt: performance.now() });
    this.#tellAll(() => ({ type: 'job', body: job }));
    try {
      return await this.#supervisor.guard(execution.done.promise);
    } finally {
      this.#execution = null;
    }
  }

  async close(): Promise<void> {
    this.#watchdog?.stop();
    if (!this.#supervisor.over) this.#tellAll(() => ({ type: 'stop' }));
    await this.#supervisor.finish(STOP_MS);
  }

  #startRanks(server: ControlServer): void {
    const { ranks, logDir } = this.#spec;
    if (logDir !== null) makeLogDir(logDir);
    this.#listen(server).catch((error: Error) => this.#supervisor.fail(error));
    const own = this.#cluster?.members.ownRanks(ranks) ?? ranks;
    for (let rank = 0; rank < own; rank++) this.#startRank(server.endpoint, rank, own);
    this.#register();
    this.#startElsewhere(server.endpoint);
    this.#watchdog = new Watchdog(
      this.#states,
      this.#spec,
      (rank) => this.#tell(rank, { type: 'where' }),
      (error) => this.#supervisor.fail(error),
    );
  }

  /** Address that this run's sockets bind to; null = ipc. A run that stays on this host has none outside it. */
  private get address(): string | null {
    const { ranks } = this.#spec;
    if (!this.#cluster || this.#cluster.members.ownRanks(ranks) === ranks) return null;
    return this.#cluster.place.address;
  }

  #startRank(control: string, rank: number, localRanks: number): void {
    const { ranks, logDir, model } = this.#spec;
    const host = hostname();
    const briefing = { model, keys: keysOf(this.#keys, rank), address: this.address };
    const started = startLocalRank(
      { control, run: this.#id, rank, ranks, node: 0, localRank: rank, localRanks, host, logDir, briefing },
      this.#hooks,
      (exit) => this.#onExit(this.#states[rank]!, exit),
    );
    this.#states.push(newState(rank, host, started));
  }

  /** Makes the run known to `tp-run ps`. */
  #register(): void {
    const { ranks, device, model } = this.#spec;
    const about = {
      run: this.#id,
      node: 0,
      nodes: this.#cluster?.place.nodes ?? 1,
      ranks,
      device,
      model: nameOf(model),
    };
    const started = this.#states.map(({ rank, process }) => [rank, process.pid] as const);
    register(this.#rendezvous!.dir, newEntry(about, started));
  }

  #startElsewhere(control: string): void {
    if (!this.#cluster) return;
    const { ranks } = this.#spec;
    const run = { launch: this.#id, control, ranks, keys: this.#keys };
    this.#cluster.onLost = (error, lost) => this.#supervisor.fail(new RankFailure(error as TpError, lost));
    const started = this.#cluster.start(run, (rank) => {
      const state = this.#states[rank]!;
      this.#onExit(state, state.process.exit!);
    });
    for (const [rank, remote] of started)
      this.#states.push(newState(rank, this.#cluster.members.of(rank).host, remote));
  }

  async #listen(server: ControlServer): Promise<void> {
    for await (const { rank, message, frames } of server.messages()) {
      const state = this.#states[rank]!;
      state.heardAt = performance.now();
      try {
        await this.#hear(state, message, frames);
      } catch (error) {
        this.#supervisor.fail(error as Error);
      }
    }
  }

  async #hear(state: RankState, message: WorkerMessage, frames: readonly Buffer[]): Promise<void> {
    const { rank } = state;
    // a job that failed must not end well by what the ranks still say; an error may be an earlier one
    if (this.#supervisor.over && message.type !== 'error' && message.type !== 'at') return;
    switch (message.type) {
      case 'hello':
        if (this.#endpoints.has(rank)) return;
        state.host = message.host;
        this.#endpoints.set(rank, message.endpoints);
        if (this.#endpoints.size === this.#spec.ranks) this.#tellAll((other) => this.#setup(other));
        return;
      case 'stage':
        state.stage = message.stage;
        return;
      case 'progress':
        return log.progress(this.#loading.add(rank, message));
      case 'ready':
        state.stage = 'ready';
        this.ranks[rank] = {
          rank,
          host: state.host,
          pid: state.process.pid!,
          ...parseReady(message.body, rank),
        };
        if (Object.keys(this.ranks).length === this.#spec.ranks) this.#ready.resolve();
        return;
      case 'report':
        await this.#execution?.report(rank, unpackReport(message.body, frames, rank));
        state.step = (message.body as { step: number }).step;
        return;
      case 'result':
        state.job = null;
        return this.#execution?.result(rank, parseResult(message.body, rank));
      case 'at':
        Object.assign(state, { collectives: message.collectives, asyncError: message.asyncError });
        this.#onAnswer?.();
        return this.#watchdog?.answer(rank, { doing: message.doing, waits: message.waitsFor !== null });
      case 'error':
        return this.#onError(state, message);
    }
  }

  /** Which endpoints of lower ranks `rank` connects to, and everything else it must know. */
  #setup(rank: number): LauncherMessage {
    const bound = [...this.#endpoints].filter(([, endpoints]) => String(rank) in endpoints);
    const peers = Object.fromEntries(bound.map(([lower, endpoints]) => [lower, endpoints[rank]!]));
    const body: Setup = { spec: sentSpec(this.#spec), collective: this.collective.name };
    return { type: 'setup', peers, body };
  }

  /** Asks every rank that can still answer for its last collectives; those of one that has ended stay as they were. */
  #inquire(): Promise<void> {
    const silent = this.#states.filter(
      ({ process, stage, hasReported }) => process.exit === null && stage === 'ready' && !hasReported,
    );
    for (const state of silent) {
      state.collectives = null;
      this.#tell(state.rank, { type: 'where' });
    }
    return new Promise((resolve) => {
      this.#onAnswer = () => {
        if (silent.every(({ collectives }) => collectives !== null)) resolve();
      };
      this.#onAnswer();
    });
  }

  #diagnose({ code }: TpError): Promise<string | null> {
    const address = rasAddress(this.#hooks.env ?? {});
    if (this.collective.name !== 'nccl' || !address || !NCCL_KNOWS.includes(code))
      return Promise.resolve(null);
    return askRas(address, RAS_MS);
  }

  #onError(state: RankState, message: WorkerMessage & { type: 'error' }): void {
    const { rank } = state;
    const { code, text, exitCode, collectives, asyncError } = message;
    Object.assign(state, { hasReported: true, collectives, asyncError });
    this.#onAnswer?.();
    // it waited for another rank, which may wait itself: ask them all before blaming one
    if (code === 'TP_COLLECTIVE_TIMEOUT') {
      this.#watchdog?.answer(rank, { doing: text, waits: true });
      this.#watchdog?.inquire();
      return;
    }
    const error = new TpError(code, exitCode, text, { rank, size: this.#spec.ranks });
    const failure = exitCode === EXIT.input ? error : new RankFailure(error, [rank]);
    // its exit may be seen before its own words about it
    this.#supervisor.fail(failure, Math.min(performance.now(), (state.process.exit?.at ?? Infinity) - 1));
  }

  /** A rank that leaves with an exit code of ours has said why: its words may arrive a moment after its end is seen. */
  #onExit(state: RankState, exit: Exit): void {
    const speaks = exit.code === EXIT.worker || exit.code === EXIT.input;
    if (speaks) setTimeout(() => this.#judgeExit(state, exit), WORDS_MS);
    else this.#judgeExit(state, exit);
  }

  #judgeExit(state: RankState, exit: Exit): void {
    if (state.hasReported) return;
    const how = `${describeExit(exit)} ${describePlace(state)}`;
    const error = fail('TP_WORKER_DIED', `rank ${state.rank} on ${state.host}`, how);
    this.#supervisor.fail(new RankFailure(error, [state.rank]), exit.at);
  }

  #tellAll(message: (rank: number) => LauncherMessage): void {
    for (const { rank } of this.#states) this.#tell(rank, message(rank));
  }

  /** A rank that cannot be reached is dead or dying: its exit says so, or its time-out. */
  #tell(rank: number, message: LauncherMessage): void {
    this.#server?.send(rank, message).catch((error: Error) => log.debug(`rank ${rank}: ${error.message}`));
  }

  #cleanUp(): void {
    this.#watchdog?.stop();
    this.#server?.close();
    this.#rendezvous?.remove();
    log.progress('');
  }
}

function makeLogDir(dir: string): void {
  try {
    makeFolder(dir);
  } catch (error) {
    throw fail('TP_LOG_DIR', dir, (error as Error).message);
  }
}

function newState(rank: number, host: string, process: RankHandle): RankState {
  return {
    rank,
    host,
    process,
    stage: 'spawn',
    job: null,
    hasReported: false,
    step: -1,
    heardAt: performance.now(),
    collectives: null,
    asyncError: '',
  };
}
