// Runs tp-run as a user does and says what held and what did not. Plain Node: it also runs inside the bundle, where
// there is neither npm nor a test framework.

import { spawn } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');
export const REAL_WIDTH = join(root, 'configs/gemma-4-26b-a4b-3layers.json');

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Throws with `message` unless `condition`. */
export function must(condition, message) {
  if (!condition) throw new Error(message);
}

/** A tp-run under way. `env` is added to the environment, without TP_RUN_* variables of whoever started the tests. */
export class Running {
  stdout = '';
  stderr = '';

  constructor(args, { env = {}, limitS = 300 } = {}) {
    const clean = Object.entries(process.env).filter(([name]) => !name.startsWith('TP_RUN_'));
    const words = [join(root, 'dist/cli/main.js'), ...args];
    this.started = performance.now();
    this.child = spawn(process.execPath, words, {
      cwd: root,
      env: { ...Object.fromEntries(clean), ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    this.child.stdout.setEncoding('utf8').on('data', (text) => {
      this.stdout += text;
    });
    this.child.stderr.setEncoding('utf8').on('data', (text) => {
      this.stderr += text;
    });
    const timer = setTimeout(() => {
      this.late = limitS;
      this.child.kill('SIGKILL'); // its workers end with it
    }, limitS * 1000);
    this.ended = new Promise((resolve) => {
      this.child.once('close', (code, signal) => {
        clearTimeout(timer);
        this.over = true;
        const seconds = (performance.now() - this.started) / 1000;
        resolve({ code, signal, seconds, stdout: this.stdout, stderr: this.stderr, late: this.late });
      });
    });
  }

  /** Process ids of its workers, by rank; a process that has not become a worker yet is not among them. */
  workers() {
    const found = [];
    for (const pid of readdirSync('/proc').filter((name) => /^\d+$/.test(name))) {
      try {
        const parent = /^PPid:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))[1];
        const words = readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0');
        const at = words.indexOf('worker');
        if (Number(parent) === this.child.pid && at >= 0) found[Number(words[at + 3])] = Number(pid);
      } catch {
        // it has just ended
      }
    }
    return found.filter((pid) => pid !== undefined);
  }

  /** Resolves with the workers' process ids once `count` of them are there. */
  async spawned(count) {
    await this.until(() => this.workers().length >= count, 60, `${count} workers`);
    return this.workers();
  }

  /** Resolves when tokens come out. */
  decoding() {
    return this.until(() => this.stdout.split(' ').length > 20, 120, 'tokens');
  }

  async until(condition, seconds, what) {
    const start = performance.now();
    while (!condition()) {
      if (this.over) throw new Error(`the run ended before there were ${what}: ${this.stderr}`);
      if (performance.now() - start > seconds * 1000)
        throw new Error(`no ${what} within ${seconds} s: ${this.stderr}`);
      await sleep(5);
    }
  }
}

/** Runs to the end: exit code, output and seconds. */
export function run(args, options) {
  return new Running(args, options).ended;
}

/** Runs to the end, which must be good; stdout parsed where `--json` is among the words. */
export async function good(args, options) {
  const ended = await run(args, options);
  must(!ended.late, `tp-run ${args.join(' ')}: not over after ${ended.late} s\n${ended.stderr}`);
  must(
    ended.code === 0,
    `tp-run ${args.join(' ')} ended with ${ended.code ?? ended.signal}\n${ended.stderr}`,
  );
  return args.includes('--json') ? JSON.parse(ended.stdout) : ended;
}

/** True while a process of that id runs; one that only waits to be buried does not. */
export function isAlive(pid) {
  try {
    return !/^State:\s+[ZX]/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return false;
  }
}

/** Named pieces of work, run one after the other; nothing is left out in silence. */
export class Suite {
  results = [];
  #only;
  #onResult;

  /** `only`: pieces of names with commas between them, to run what holds one of them. `onResult` hears of each piece. */
  constructor(only = null, onResult = () => {}) {
    this.#only = only;
    this.#onResult = onResult;
  }

  /** Says why a piece of work cannot be done here. */
  leaveOut(name, why) {
    this.results.push({ name, outcome: 'left out', seconds: 0, said: why, data: null });
  }

  /** `work` returns what is to be said, or `said` and `data` for the results. */
  async test(name, work) {
    if (this.#only !== null && !this.#only.split(',').some((piece) => name.includes(piece)))
      return this.leaveOut(name, `--only ${this.#only}`);
    const start = performance.now();
    let outcome = 'passed';
    let said = '';
    let data = null;
    try {
      const result = await work();
      if (typeof result === 'object') ({ said, data } = result);
      else said = result ?? '';
    } catch (error) {
      outcome = 'FAILED';
      said = error instanceof Error ? error.message : String(error);
    }
    const seconds = (performance.now() - start) / 1000;
    this.results.push({ name, outcome, seconds, said, data });
    this.#onResult();
    console.log(`${outcome}  ${name} (${seconds.toFixed(1)} s)${said ? `: ${said}` : ''}`);
  }

  /** Prints the sum; the exit code. */
  end() {
    const count = (outcome) => this.results.filter((result) => result.outcome === outcome).length;
    const [passed, failed, out] = ['passed', 'FAILED', 'left out'].map(count);
    for (const { name } of this.results.filter(({ outcome }) => outcome === 'FAILED'))
      console.log(`  ${name}`);
    console.log(`${passed} passed, ${failed} failed${out ? `, ${out} left out` : ''}`);
    return failed || passed === 0 ? 1 : 0;
  }
}
