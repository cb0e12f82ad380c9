// What a person at a terminal sees: `script` gives the command a real one.

import { execFileSync, spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { root } from '../helpers/fixture.js';
import { tempDir } from '../helpers/tempdir.js';

const words = '--device cpu --threads 1 --prompt-ids 2,17,5 --max-tokens 200 --ignore-eos';
const command = `"${process.execPath}" "${join(root, 'dist/cli/main.js')}" ${words}`;

/** What `line` of a shell writes to its terminal. */
function onTerminal(line: string): string {
  const log = join(tempDir(), 'terminal');
  execFileSync('script', ['-qefc', line, log], { stdio: ['ignore', 'pipe', 'inherit'] });
  return readFileSync(log, 'utf8');
}

const PROGRESS = /\r\x1b\[K\d+ of 200 tokens(, \d[\d.]* tokens\/s)?/;

describe('on a terminal', () => {
  it('shows tokens and tokens a second while the result goes to a file, and takes the line away', () => {
    const out = join(tempDir(), 'out');
    const seen = onTerminal(`${command} > "${out}"`);
    expect(seen).toMatch(PROGRESS);
    expect(seen).toMatch(/\r\x1b\[K200 tokens: load/); // the summary stands where the line was
    expect(readFileSync(out, 'utf8')).toMatch(/^\d+( \d+){199}\n$/);
  });

  it('shows it while --json keeps stdout quiet', () => {
    const seen = onTerminal(`${command} --json`);
    expect(seen).toMatch(PROGRESS);
    expect(seen).toMatch(/\r\x1b\[K\{"schema"/);
  });

  it('leaves the streamed tokens of the same terminal alone', () => {
    const seen = onTerminal(command);
    expect(seen).not.toMatch(/of 200 tokens/);
    expect(seen).toMatch(/\x1b\[K\d+( \d+){199}\r$/m); // from where the weights' line stood
  });

  it('is silent where stderr is no terminal', () => {
    const { stderr } = spawnSync('sh', ['-c', command], { encoding: 'utf8' });
    expect(stderr).not.toMatch(/\x1b|of 200 tokens/);
  });
});
