// A tp-run under way that a test does things to: its processes, its output, and how it ended.

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { root } from './fixture.js';

export interface Ended {
  code: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}

export class Running {
  readonly ended: Promise<Ended>;
  readonly #child: ChildProcess;
  #stdout = '';
  #stderr = '';

  /** `via` is a command that runs another one in its place, such as `ip netns exec NAME`. */
  constructor(args: readonly string[], env: Record<string, string> = {}, via: readonly string[] = []) {
    const [file, ...words] = [...via, process.execPath, join(root, 'dist/cli/main.js'), ...args];
    const clean = Object.entries(process.env).filter(([name]) => !name.startsWith('TP_RUN_'));
    this.#child = spawn(file!, words, {
      cwd: root,
      env: { ...Object.fromEntries(clean), ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    this.#child.stdout!.setEncoding('utf8').on('data', (text: string) => {
      this.#stdout += text;
    });
    this.#child.stderr!.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr += text;
    });
    this.ended = once(this.#child, 'close').then(([code, signal]) => ({
      code,
      signal,
      stdout: this.#stdout,
      stderr: this.#stderr,
    }));
  }

  get stdout(): string {
    return this.#stdout;
  }

  get stderr(): string {
    return this.#stderr;
  }

  get hasEnded(): boolean {
    return this.#child.exitCode !== null || this.#child.signalCode !== null;
  }

  get pid(): number {
    return this.#child.pid!;
  }

  /** Resolves when it has said something on stderr that `pattern` matches. */
  async said(pattern: RegExp): Promise<void> {
    await this.#until(() => pattern.test(this.#stderr));
  }

  /** Process ids of the workers so far, in the order of ranks. */
  workers(): number[] {
    try {
      const children = readFileSync(`/proc/${this.#child.pid}/task/${this.#child.pid}/children`, 'utf8');
      return children.split(' ').filter(Boolean).map(Number);
    } catch {
      return [];
    }
  }

  /** Resolves with the workers' process ids when `count` of them have been forked. */
  async spawned(count: number): Promise<number[]> {
    await this.#until(() => this.workers().length >= count);
    return this.workers();
  }

  /** Resolves when tokens come out. */
  async decoding(): Promise<void> {
    await this.#until(() => this.#stdout.length > 0);
  }

  signal(signal: NodeJS.Signals): void {
    this.#child.kill(signal);
  }

  async #until(condition: () => boolean): Promise<void> {
    await until(
      () => condition() || this.hasEnded,
      20_000,
      () => this.#stderr,
    );
    if (!condition()) throw new Error(`the run ended too early: ${this.#stderr}`);
  }
}

/** True while a process of that id runs; one that only waits to be buried does not. */
export function isAlive(pid: number): boolean {
  try {
    return !/^State:\s+[ZX]/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return false;
  }
}

/** The command line of a process: of a forked one, its parent's until it starts its own program. */
export function commandLine(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ');
  } catch {
    return '';
  }
}

/** Resident memory of a process; 0 when it has gone. */
export function residentMiB(pid: number): number {
  try {
    return Number(/^VmRSS:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1] ?? 0) / 1024;
  } catch {
    return 0;
  }
}

/** Waits for `condition`; throws after `ms`. Milliseconds that it took. */
export async function until(
  condition: () => boolean,
  ms: number,
  about: () => string = () => '',
): Promise<number> {
  const start = performance.now();
  while (!condition()) {
    if (performance.now() - start > ms) throw new Error(`not within ${ms} ms: ${condition}\n${about()}`);
    await sleep(2);
  }
  return performance.now() - start;
}

export function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
