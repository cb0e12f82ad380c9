// A failed run told in full: per rank where it was and how it ended, what the ranks' collectives say together, and the
// likely cause in one line. The same on the terminal and, with --log-dir, in error.json.

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { compareRecords, describeEntry, type RecordedCollective } from '../comm/flight-recorder.js';
import type { Stage } from '../comm/messages.js';
import { TpError } from '../errors.js';
import { log } from '../log.js';
import type { Exit, RankHandle } from './process.js';

/** What the launcher knows of one rank. */
export interface RankState {
  rank: number;
  host: string;
  process: RankHandle;
  stage: Stage;
  /** The kind of job that it is at, null between jobs. */
  job: string | null;
  /** It has told what went wrong with it: its exit is no news. */
  hasReported: boolean;
  /** Last completed step, -1 before the first. */
  step: number;
  /** performance.now() of its last message. */
  heardAt: number;
  /** Its last collectives, once it has been asked. */
  collectives: readonly RecordedCollective[] | null;
  /** What its device collective said went wrong, '' = nothing. */
  asyncError: string;
}

/** A failure of one or more ranks; its message grows a summary when all output is in. */
export class RankFailure extends TpError {
  readonly culprits: readonly number[];

  constructor(error: TpError, culprits: readonly number[]) {
    super(error.code, error.exitCode, error.text, error.at);
    this.culprits = culprits;
  }
}

/** Where the ranks were at the moment of a failure: what follows changes how they look. */
export interface Scene {
  ranks: readonly RankState[];
  /** By place in `ranks`. */
  places: readonly string[];
  exits: readonly (Exit | null)[];
  /** State letters of the processes on this host, `T` = stopped. */
  states: readonly (string | null)[];
}

export function takeScene(ranks: readonly RankState[]): Scene {
  return {
    ranks,
    places: ranks.map(describePlace),
    exits: ranks.map(({ process }) => process.exit),
    states: ranks.map(({ process }) => process.state()),
  };
}

/** Everything about a failed run; what error.json holds. */
export interface FailureReport {
  schema: 'tp-run/error/1';
  time: string;
  run: string;
  code: string;
  message: string;
  exit_code: number;
  /** Ranks that the failure is about. */
  culprits: readonly number[];
  likely_cause: string | null;
  /** What the ranks' last collectives say together. */
  collectives: string | null;
  /** NCCL's own report of the run while it hung. */
  nccl_ras: string | null;
  ranks: {
    rank: number;
    host: string;
    pid: number | null;
    stage: string;
    job: string | null;
    last_step: number | null;
    exit: string;
    stderr: readonly string[];
    collectives: readonly RecordedCollective[] | null;
    async_error: string | null;
  }[];
}

/** Call it when every process has gone: then all output is in. */
export function reportFailure(
  run: string,
  error: TpError,
  scene: Scene,
  ras: string | null = null,
): FailureReport {
  const culprits = error instanceof RankFailure ? error.culprits : [];
  const known = scene.ranks.flatMap(({ rank, collectives }) =>
    collectives ? [[rank, collectives] as const] : [],
  );
  return {
    schema: 'tp-run/error/1',
    time: new Date().toISOString(),
    run,
    code: error.code,
    message: error.text,
    exit_code: error.exitCode,
    culprits,
    likely_cause: likelyCause(error, culprits, scene),
    collectives: compareRecords(new Map(known)),
    nccl_ras: ras,
    ranks: scene.ranks.map(({ rank, host, process, stage, job, step, collectives, asyncError }, i) => ({
      rank,
      host,
      pid: process.pid ?? null,
      stage,
      job,
      last_step: step < 0 ? null : step,
      exit: describeExit(scene.exits[i]!),
      stderr: process.tail,
      collectives,
      async_error: asyncError || null,
    })),
  };
}

/** Of NCCL's report, on the terminal; error.json has it all. */
const RAS_LINES = 40;

/** The error as people read it. */
export function summarize(error: TpError, report: FailureReport, scene: Scene): TpError {
  const lines = scene.ranks.map(({ rank, host, process, collectives, asyncError }, i) => {
    const latest = collectives?.at(-1);
    const said = asyncError && `; ${asyncError}`;
    const where = latest ? `, ${latest.tookMs === null ? 'in' : 'after'} ${describeEntry(latest)}` : '';
    return `  rank ${rank} on ${host} (pid ${process.pid}): ${scene.places[i]}${where}; ${describeExit(scene.exits[i]!)}${said}`;
  });
  const tails = report.ranks
    .filter(({ rank, stderr }) => report.culprits.includes(rank) && stderr.length)
    .map(({ rank, stderr }) => quoted(`last lines of rank ${rank}:`, stderr));
  const ras = report.nccl_ras?.split('\n') ?? [];
  const more = [
    ...(report.collectives ? [`collectives: ${report.collectives}`] : []),
    ...(report.likely_cause ? [`likely cause: ${report.likely_cause}`] : []),
  ];
  if (ras.length) tails.push(quoted('NCCL reports:', ras.slice(0, RAS_LINES)));
  return new TpError(error.code, error.exitCode, [error.text, ...lines, ...more, ...tails].join('\n'));
}

const quoted = (title: string, lines: readonly string[]): string =>
  [title, ...lines.map((line) => `  | ${line}`)].join('\n');

/** Writes error.json into the folder of the logs; a disk that is full must not hide the failure itself. */
export function writeReport(dir: string, report: FailureReport): void {
  try {
    writeFileSync(join(dir, 'error.json'), `${JSON.stringify(report, null, 1)}\n`);
  } catch (error) {
    log.warn(`error.json could not be written: ${(error as Error).message}`);
  }
}

const NATIVE_CRASHES = ['SIGSEGV', 'SIGABRT', 'SIGFPE', 'SIGTRAP'];

/** One line, or null where the message says it all. */
function likelyCause(error: TpError, culprits: readonly number[], scene: Scene): string | null {
  if (error.code === 'TP_NODE_LOST') return null;
  if (error.code === 'TP_RANKS_DISAGREE')
    return 'memory that gives wrong bits, or a fault of tp-run: "tp-run check" on each host tells';
  if (scene.ranks.some(({ asyncError }) => asyncError !== ''))
    return 'another rank, or the network between them, is gone; NCCL_DEBUG=WARN tells more on each host';
  const at = scene.ranks.findIndex(({ rank }) => culprits.includes(rank));
  if (at < 0) return null;
  const { rank, process } = scene.ranks[at]!;
  const exit = scene.exits[at];
  if (scene.states[at] === 'T' || scene.states[at] === 't')
    return `rank ${rank} is stopped (SIGSTOP, a debugger); kill -CONT ${process.pid} lets it go on`;
  if (scene.states[at] === 'D') return `rank ${rank} hangs in the kernel: a disk or a network file system`;
  if (!exit) return null;
  if (exit.signal === 'SIGKILL')
    return 'somebody sent SIGKILL, or the kernel did for lack of memory: see dmesg';
  if (exit.signal === 'SIGBUS')
    return 'memory that could not be had: is /dev/shm, or a disk that is mapped, full?';
  if (exit.signal === 'SIGILL') return 'an instruction that this CPU lacks: try --isa generic';
  if (exit.signal && NATIVE_CRASHES.includes(exit.signal))
    return 'a crash in native code: please report it with the lines below';
  if (exit.code === 127) return 'a program or library that is not there';
  return null;
}

/** `in stage weights, no step completed`, `in generate, last completed step 12` */
export function describePlace({ stage, job, step }: RankState): string {
  const steps = step < 0 ? 'no step completed' : `last completed step ${step}`;
  return `in ${job ?? `stage ${stage}`}, ${steps}`;
}

/** `killed by SIGKILL`, `exited with code 4`, `running` */
export function describeExit(exit: Exit | null): string {
  if (!exit) return 'running';
  if (exit.signal === null && exit.code === null) return 'lost with its node';
  return exit.signal ? `killed by ${exit.signal}` : `exited with code ${exit.code}`;
}
