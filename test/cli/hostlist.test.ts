import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { expandHostlist, expandTasks } from '../../src/cli/hostlist.js';
import { requireProgram } from '../helpers/slurm.js';
import { tempDir } from '../helpers/tempdir.js';

/** What Slurm itself makes of it. */
function scontrol(list: string, conf: string): string[] {
  const output = execFileSync('scontrol', ['show', 'hostnames', list], {
    encoding: 'utf8',
    env: { ...process.env, SLURM_CONF: conf },
  });
  return output.trim().split('\n');
}

const number = fc.integer({ min: 0, max: 120 });
const padded = (n: number, width: number) => String(n).padStart(width, '0');
const range = fc
  .tuple(number, fc.integer({ min: 0, max: 5 }), fc.integer({ min: 1, max: 4 }))
  .map(([from, more, width]) =>
    more === 0 ? padded(from, width) : `${padded(from, width)}-${padded(from + more, width)}`,
  );
const brackets = fc.array(range, { minLength: 1, maxLength: 3 }).map((ranges) => `[${ranges.join(',')}]`);
const host = fc
  .tuple(fc.constantFrom('n', 'gpu-', 'rack2-node'), fc.option(brackets), fc.option(brackets))
  .map(([stem, a, b]) => `${stem}${a ?? 'x'}${b === null ? '' : `-${b}`}`);
const list = fc.array(host, { minLength: 1, maxLength: 3 }).map((hosts) => hosts.join(','));

describe('a host list', () => {
  it('is read as Slurm reads it', () => {
    requireProgram('scontrol', 'slurm-wlm');
    const conf = join(tempDir(), 'slurm.conf');
    writeFileSync(conf, 'ClusterName=x\nSlurmctldHost=localhost\nNodeName=n0\n');
    for (const text of ['n[001-003,007]', 'a,b', 'n1', 'gpu-[1-2]-[08-10],n[9-11]', 'x[1,3],y']) {
      expect(expandHostlist(text), text).toEqual(scontrol(text, conf));
    }
    fc.assert(
      fc.property(list, (text) => {
        expect(expandHostlist(text)).toEqual(scontrol(text, conf));
      }),
      { numRuns: 100 },
    );
  });

  it.each([
    ['n[1-', 'bracket'],
    ['n]', 'bracket'],
    ['n[3-1]', 'backwards'],
    ['n[1-999999999]', 'more than 65536'],
    ['n[0-999][0-999]', 'more than 65536'],
    ['a,,b', 'empty'],
    ['', 'empty'],
    ['n[]', 'range ""'],
    ['n[$(x)]', 'range'],
    ['n[99999999999999999998-99999999999999999999]', 'more than 15 digits'],
  ])('%j is refused', (text, why) => {
    expect(() => expandHostlist(text)).toThrow(why);
  });

  it('never takes long or crashes, whatever it is', () => {
    fc.assert(
      fc.property(fc.string({ unit: fc.constantFrom(...'n09[]-,()x.'), maxLength: 40 }), (text) => {
        try {
          expect(expandHostlist(text).length).toBeLessThanOrEqual(65_536);
        } catch (error) {
          expect(error).toMatchObject({ code: 'TP_LAUNCHER' });
        }
      }),
      { numRuns: 2000 },
    );
  });
});

describe('a list as long as a variable can be', () => {
  it.each([
    ['of names', `${'a,'.repeat(60_000)}a`, 60_001],
    ['of too many names', 'a,'.repeat(70_000), null],
    ['of ranges that are many in all', `n[${'1-60000,'.repeat(10_000)}1]`, null],
    ['of brackets that never close', '['.repeat(130_000), null],
  ])('%s is read or refused at once', (_, text, hosts) => {
    const start = performance.now();
    if (hosts === null) expect(() => expandHostlist(text)).toThrow('TP_LAUNCHER');
    else expect(expandHostlist(text)).toHaveLength(hosts);
    expect(performance.now() - start).toBeLessThan(1000);
  });

  it('of tasks is refused at once when they are too many in all', () => {
    expect(() => expandTasks('65536(x65536),'.repeat(9000))).toThrow('TP_LAUNCHER');
  });
});

describe('tasks per node', () => {
  it('come in the short form', () => {
    expect(expandTasks('2(x3),1')).toEqual([2, 2, 2, 1]);
    expect(expandTasks('4')).toEqual([4]);
    expect(() => expandTasks('2(x)')).toThrow('TP_LAUNCHER');
  });
});
