// native/comm/nccl.cu over a stub of NCCL: errors, time-outs and aborts, which no healthy GPU shows. Needs nvcc.

import { execFileSync, spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { root } from '../helpers/fixture.js';

const helper = (name: string) => join(root, 'test/helpers', name);
const hasNvcc = spawnSync('nvcc', ['--version']).status === 0;

/** What the driver prints, by its first words. */
type Said = Record<string, string>;

describe.runIf(hasNvcc)('NCCL that misbehaves', () => {
  const dir = mkdtempSync(join(tmpdir(), 'tp-run-test-'));
  afterAll(() => rmSync(dir, { recursive: true }));
  beforeAll(() => {
    const stub = ['-shared', '-fPIC', '-o', join(dir, 'libnccl.so.2'), helper('nccl-stub.cc')];
    execFileSync(process.env.CXX ?? 'c++', stub);
    const sources = [join(root, 'native/comm/nccl.cu'), helper('nccl-driver.cc')];
    const words = ['-std=c++20', '-I', join(root, 'native'), ...sources, '-o', join(dir, 'driver'), '-ldl'];
    execFileSync('nvcc', words, { stdio: 'pipe' });
  }, 300_000);

  function drive(how: string): Said {
    const env = { ...process.env, LD_LIBRARY_PATH: dir, STUB_NCCL: how };
    const output = execFileSync(join(dir, 'driver'), [how], { env, encoding: 'utf8', timeout: 20_000 });
    return Object.fromEntries(
      output
        .trim()
        .split('\n')
        .map((line) => [line.slice(0, line.indexOf(':')), line.slice(line.indexOf(':') + 2)]),
    );
  }
  const LOST = 'nccl: remote process exited or there was a network error: socket closed by 10.0.0.2';

  it('not at all has no error, and after an abort says that it was told to', () => {
    expect(drive('')).toEqual({
      connect: 'ok',
      'all-reduce': 'ok',
      error: '',
      'after abort': 'nccl: told to stop waiting',
      'all-gather': 'TP_COLLECTIVE: nccl: told to stop waiting',
      aborts: '1',
      'within 2 s': 'yes',
    });
  });

  it('by losing a peer while nobody calls says so in its own words, also after it was aborted', () => {
    const said = drive('loses a peer');
    expect(said).toMatchObject({ 'all-reduce': 'ok', error: LOST, 'after abort': LOST, aborts: '1' });
    expect(said['all-gather']).toBe(`TP_COLLECTIVE: ${LOST}`);
  });

  it('by refusing to start, or never starting, is an error in bounded time', () => {
    expect(drive('refuses').connect).toBe(
      'TP_COLLECTIVE: nccl: start: remote process exited or there was a network error: socket closed by 10.0.0.2',
    );
    expect(drive('never starts').connect).toMatch(
      /^TP_COLLECTIVE: nccl: start took longer than 0 s; is every rank/,
    );
  });

  it('can be aborted by another thread in the middle of a call', () => {
    const said = drive('aborted');
    expect(said).toMatchObject({
      aborts: '1',
      'within 2 s': 'yes',
      'after abort': 'nccl: told to stop waiting',
    });
  });
});
