import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, existsSync, mkdtempSync, utimesSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import {
  findRuns,
  isLeftBehind,
  lives,
  newEntry,
  processId,
  type RunEntry,
  register,
  removeSharedMemory,
} from '../../src/engine/registry.js';
import { tempDir } from '../helpers/tempdir.js';

const ABOUT = { run: 'ab12', node: 0, nodes: 1, ranks: 2, device: 'cpu', model: 'tiny.json' };
const entry = (): RunEntry => newEntry(ABOUT, [[0, process.pid]]);
const folderIn = (parent: string) => mkdtempSync(join(parent, 'tp-run-'));

describe('the registry of runs', () => {
  it('lists a run whose launcher lives, and none that is over', () => {
    const parent = tempDir();
    register(folderIn(parent), entry());
    const over = folderIn(parent);
    register(over, { ...entry(), run: 'cd34', launcher: { pid: process.pid, started: '1' } });
    folderIn(parent); // a run that has not come so far
    expect(findRuns(parent)).toMatchObject([{ run: 'ab12', workers: [{ rank: 0, pid: process.pid }] }]);
    expect(isLeftBehind(over)).toBe(true);
    expect(isLeftBehind(findRuns(parent)[0]!.folder)).toBe(false);
  });

  it('believes no folder that others may write, and no entry that is malformed', () => {
    const parent = tempDir();
    const open = folderIn(parent);
    register(open, entry());
    chmodSync(open, 0o770);
    const odd = folderIn(parent);
    writeFileSync(join(odd, 'run.json'), JSON.stringify({ ...entry(), more: 1 }));
    expect(findRuns(parent)).toEqual([]);
    expect([open, odd].some(isLeftBehind)).toBe(false);
  });

  it('tells a process from a later one of the same id', async () => {
    const child = spawn('sleep', ['1000']);
    const id = processId(child.pid!)!;
    expect([lives(id), lives({ ...id, started: `${Number(id.started) + 1}` })]).toEqual([true, false]);
    child.kill('SIGKILL');
    await once(child, 'exit');
    expect([lives(id), processId(child.pid!)]).toEqual([false, null]);
  });
});

describe('shared memory that a killed run has left', () => {
  const children: ReturnType<typeof spawn>[] = [];
  afterEach(() => {
    for (const child of children.splice(0)) child.kill('SIGKILL');
  });

  it('goes, but not what is young, mapped by a process, or of another name', async () => {
    const dir = tempDir();
    const make = (name: string, seconds: number) => {
      const path = join(dir, name);
      writeFileSync(path, Buffer.alloc(4096));
      utimesSync(path, Date.now() / 1000 - seconds, Date.now() / 1000 - seconds);
      return path;
    };
    const [left, young, other, used] = [
      make('nccl-a1', 300),
      make('nccl-b2', 1),
      make('psm-1', 300),
      make('nccl-c3', 300),
    ];
    const map = `import mmap,sys,time; f=open(${JSON.stringify(used)},'r+b'); m=mmap.mmap(f.fileno(),4096); f.close(); print('ok',flush=True); time.sleep(1000)`;
    const mapping = spawn('python3', ['-c', map]);
    children.push(mapping);
    await once(mapping.stdout, 'data');
    removeSharedMemory(dir);
    expect([left, young, other, used].map((path) => existsSync(path))).toEqual([false, true, true, true]);
  });
});
