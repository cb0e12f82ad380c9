// Where a number comes from: machine, software and commit, in every result that someone may quote.

import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { availableParallelism, cpus, freemem, hostname, release, totalmem } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { native } from '../native.js';

const ROOT = join(dirname(fileURLToPath(import.meta.url)), '..', '..');

export interface Provenance {
  version: string;
  /** Commit of the source tree; null outside a git checkout. */
  commit: string | null;
  /** Files differ from that commit. */
  dirty: boolean | null;
  node: string;
  addon: string;
  cuda: string | null;
  host: string;
  os: string;
  cpu: string;
  cores: number;
  memory_gb: number;
  time: string;
}

/** Asks the machine; loads the addon. */
export function provenance(): Provenance {
  const addon = native().version();
  const commit = git('rev-parse', '--short=12', 'HEAD');
  return {
    version: packageVersion(),
    commit,
    dirty: commit === null ? null : git('status', '--porcelain', '--untracked-files=no') !== '',
    node: process.version,
    addon: addon.addon,
    cuda: addon.cuda,
    host: hostname(),
    os: `${process.platform} ${process.arch} ${release()}`,
    cpu: cpuModel(),
    cores: availableParallelism(),
    memory_gb: round(totalmem() / 1e9),
    time: new Date().toISOString(),
  };
}

/** The version in package.json. */
export function packageVersion(): string {
  return (JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as { version: string }).version;
}

export function cpuModel(): string {
  return cpus()[0]?.model.trim() ?? 'unknown';
}

export function freeMemoryGb(): number {
  return round(freemem() / 1e9);
}

function round(gb: number): number {
  return Math.round(gb * 10) / 10;
}

/** Output of a git command in the source tree; null where there is no git or no checkout of tp-run itself. */
function git(...args: string[]): string | null {
  const run = (words: string[]) =>
    execFileSync('git', words, { cwd: ROOT, encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }).trim();
  try {
    return run(['rev-parse', '--show-prefix']) === '' ? run(args) : null;
  } catch {
    return null;
  }
}
