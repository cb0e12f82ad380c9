// Where a number comes from: machine, software and commit, in every result that someone may quote.

import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { availableParallelism, cpus, hostname, release } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { native } from '../native.js';
import { memoryGb } from './machine.js';
import type { Provenance } from './schema.js';

const ROOT = join(dirname(fileURLToPath(import.meta.url)), '..', '..');

/** Asks the machine and git; loads the addon. `commit` is null outside a checkout of tp-run and its bundles, `dirty`: files differ from it. */
export function provenance(): Provenance {
  const addon = native().version();
  return {
    version: packageVersion(),
    ...(bundledCommit() ?? checkoutCommit()),
    node: process.version,
    addon: addon.addon,
    cuda: addon.cuda,
    host: hostname(),
    os: `${process.platform} ${process.arch} ${release()}`,
    cpu: cpuModel(),
    cores: availableParallelism(),
    memory_gb: memoryGb().total,
    time: new Date().toISOString(),
  };
}

type Commit = Pick<Provenance, 'commit' | 'dirty'>;

/** What a bundle was packed from: scripts/bundle.mjs leaves it beside package.json. Null in a checkout. */
function bundledCommit(): Commit | null {
  const file = join(ROOT, 'commit.json');
  return existsSync(file) ? (JSON.parse(readFileSync(file, 'utf8')) as Commit) : null;
}

function checkoutCommit(): Commit {
  const commit = git('rev-parse', '--short=12', 'HEAD');
  const dirty = commit === null ? null : git('status', '--porcelain', '--untracked-files=no') !== '';
  return { commit, dirty };
}

/** The version in package.json. */
export function packageVersion(): string {
  return (JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as { version: string }).version;
}

export function cpuModel(): string {
  return cpus()[0]?.model.trim() ?? 'unknown';
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
