// One rank's process: started in its own group, listened to, and ended for certain.

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createWriteStream, openSync, readFileSync, type WriteStream } from 'node:fs';
import { createInterface } from 'node:readline';
import type { Readable } from 'node:stream';
import { fail } from '../errors.js';
import { log } from '../log.js';

/** Lines of its stderr that a failed rank's summary shows, and characters of each: it may cross to another host. */
const TAIL_LINES = 20;
const TAIL_WIDTH = 1000;

/** How a process ended. */
export interface Exit {
  code: number | null;
  signal: NodeJS.Signals | null;
  /** performance.now() of the moment this process learnt of it */
  at: number;
}

/** The process of a rank, on this host or on another. */
export interface RankHandle {
  /** The last lines it wrote to stderr. */
  readonly tail: readonly string[];
  /** Null while it lives. */
  readonly exit: Exit | null;
  /** Resolves when it has ended and its output has been read. */
  readonly closed: Promise<unknown>;
  /** Undefined if it could not be started, or is not known yet. */
  readonly pid: number | undefined;
  /** Sends `signal` to it and to what it has left in its group. */
  kill(signal: NodeJS.Signals): void;
  /** Its state letter of proc(5), `T` = stopped; null when it is on another host, or gone. */
  state(): string | null;
  /** Stops listening to it. */
  release(): void;
}

/** What a rank's process finds around it. */
export interface Surroundings {
  /** Before each line of its output, on the way to stderr. */
  prefix: string;
  /** Its output goes there too. */
  logFile: string | null;
  /** undefined = this process's own */
  env: NodeJS.ProcessEnv | undefined;
  /** What it reads from stdin: nobody else sees that, unlike words and variables. */
  input: string;
}

export class RankProcess implements RankHandle {
  readonly tail: string[] = [];
  exit: Exit | null = null;
  readonly closed: Promise<unknown>;
  readonly #child: ChildProcess;
  #gone = false;
  readonly #log: WriteStream | null;

  /** Starts `command` with fd 3 as its death pipe: it closes when this process ends, however that happens. */
  constructor(
    command: readonly string[],
    { prefix, logFile, env, input }: Surroundings,
    onExit: (exit: Exit) => void,
  ) {
    const [file, ...args] = command;
    this.#log = logFile === null ? null : openLog(logFile);
    // detached = a group of its own: Ctrl-C reaches the launcher alone, and the group can be ended as one
    this.#child = spawn(file!, args, { env, detached: true, stdio: ['pipe', 'pipe', 'pipe', 'pipe'] });
    this.closed = once(this.#child, 'close').catch(() => {});
    this.#child.once('error', (error) => {
      this.tail.push(error.message);
      this.#ended({ code: 127, signal: null, at: performance.now() }, onExit);
    });
    this.#child.once('exit', (code, signal) => this.#ended({ code, signal, at: performance.now() }, onExit));
    this.#child.stdio[3]?.on('error', () => {});
    this.#child.stdin?.on('error', () => {}); // it has ended before it read
    this.#child.stdin?.end(input);
    this.#forward(this.#child.stdout!, prefix, false);
    this.#forward(this.#child.stderr!, prefix, true);
    void this.closed.then(() => {
      this.#gone = true;
      this.#log?.end();
    });
  }

  get pid(): number | undefined {
    return this.#child.pid;
  }

  /** To its whole group: a process that it left behind holds its pipes open and is ended with it. */
  kill(signal: NodeJS.Signals): void {
    if (this.pid === undefined || this.#gone) return;
    try {
      process.kill(-this.pid, signal);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
    }
  }

  state(): string | null {
    if (this.exit) return null;
    try {
      return /^State:\s+(\w)/m.exec(readFileSync(`/proc/${this.pid}/status`, 'utf8'))?.[1] ?? null;
    } catch {
      return null;
    }
  }

  /** Stops listening, so that pipes held open by a stray child do not keep this process alive. */
  release(): void {
    for (const stream of this.#child.stdio) stream?.destroy();
    this.#child.unref();
  }

  #ended(exit: Exit, onExit: (exit: Exit) => void): void {
    if (this.exit) return;
    this.exit = exit;
    onExit(exit);
  }

  #forward(stream: Readable, prefix: string, isError: boolean): void {
    createInterface({ input: stream, crlfDelay: Infinity }).on('line', (line) => {
      if (isError) this.tail.push(line.length > TAIL_WIDTH ? `${line.slice(0, TAIL_WIDTH)}...` : line);
      if (this.tail.length > TAIL_LINES) this.tail.shift();
      this.#log?.write(`${line}\n`);
      log.forward([line], prefix);
    });
  }
}

/**
 * Ends every process: waits `patienceMs` for them to leave, then SIGTERM, then after `graceMs` SIGKILL.
 * Resolves when all are gone, at most patienceMs + 2 * graceMs later.
 */
export async function endAll(
  processes: readonly RankHandle[],
  patienceMs: number,
  graceMs: number,
): Promise<void> {
  const gone = Promise.all(processes.map((p) => p.closed));
  if (patienceMs > 0 && (await within(gone, patienceMs))) return;
  for (const p of processes) p.kill('SIGTERM');
  if (await within(gone, graceMs)) return;
  for (const p of processes) p.kill('SIGKILL');
  await within(gone, graceMs);
  for (const p of processes) p.release();
}

/** True when `promise` resolved within `ms`. */
export async function within(promise: Promise<unknown>, ms: number): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<false>((resolve) => {
    timer = setTimeout(resolve, ms, false);
  });
  try {
    return await Promise.race([promise.then(() => true as const), late]);
  } finally {
    clearTimeout(timer);
  }
}

function openLog(file: string): WriteStream {
  let fd: number;
  try {
    fd = openSync(file, 'a');
  } catch (error) {
    throw fail('TP_LOG_DIR', file, (error as Error).message);
  }
  return createWriteStream(file, { fd }).on('error', (error) => log.warn(`${file}: ${error.message}`));
}
