import {
  chmodSync,
  chownSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { createServer, type Server } from 'node:net';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { removeStale, rendezvousFolder } from '../../src/comm/bootstrap.js';
import { tempDir } from '../helpers/tempdir.js';

const servers: Server[] = [];
afterEach(() => {
  for (const server of servers.splice(0)) server.close();
});

/** A folder of a run, with a control socket where somebody listens or, as after a kill, nobody does. */
async function folderOf(parent: string, listens: boolean): Promise<string> {
  const dir = mkdtempSync(join(parent, 'tp-run-'));
  const server = createServer();
  const path = join(dir, 'control');
  await new Promise<void>((bound) => server.listen(path, bound));
  if (listens) {
    servers.push(server);
    return dir;
  }
  // the name stays when the listener is killed; closing it in order would take it away
  const kept = join(dir, 'kept');
  const { linkSync, renameSync } = await import('node:fs');
  linkSync(path, kept);
  await new Promise((closed) => server.close(closed));
  renameSync(kept, path);
  return dir;
}

describe('folders that killed runs have left', () => {
  it('go when nobody listens there or their launcher is known to be gone; those of live runs stay', async () => {
    const parent = tempDir();
    const [dead, live] = [await folderOf(parent, false), await folderOf(parent, true)];
    const known = mkdtempSync(join(parent, 'tp-run-'));
    const starting = mkdtempSync(join(parent, 'tp-run-')); // it has bound nothing so far
    expect(await removeStale((folder) => folder === known, parent)).toBe(2);
    expect([dead, known, live, starting].map((dir) => existsSync(dir))).toEqual([false, false, true, true]);
  });

  it('stay when others can write there, and do not keep a run from starting', async () => {
    const parent = tempDir();
    const open = await folderOf(parent, false);
    chmodSync(open, 0o755);
    const elsewhere = await folderOf(tempDir(), false);
    symlinkSync(elsewhere, join(parent, 'tp-run-linked'));
    writeFileSync(join(parent, 'tp-run-file'), '');
    const foreign = await folderOf(parent, false);
    if (process.getuid!() === 0) chownSync(foreign, 12_345, 12_345);
    expect(await removeStale(() => true, parent)).toBe(process.getuid!() === 0 ? 0 : 1);
    expect([open, elsewhere, join(parent, 'tp-run-linked')].map((dir) => existsSync(dir))).toEqual([
      true,
      true,
      true,
    ]);
  });
});

describe('the folder where the nodes of one host meet', () => {
  it('is made by node 0, awaited by the others, and private', async () => {
    const parent = tempDir();
    const waiting = rendezvousFolder('job-7', false, 5000, parent);
    const { dir, remove } = await rendezvousFolder('job-7', true, 5000, parent);
    expect((await waiting).dir).toBe(dir);
    (await waiting).remove();
    expect(existsSync(dir)).toBe(true); // it is node 0's
    remove();
    expect(existsSync(dir)).toBe(false);
  });

  it('is refused when it is a link, open to others, or does not come', async () => {
    const parent = tempDir();
    const place = join(parent, `tp-run-${process.getuid!()}-job-7`);
    mkdirSync(place, { mode: 0o755 });
    chmodSync(place, 0o755);
    await expect(rendezvousFolder('job-7', true, 0, parent)).rejects.toThrow(/^TP_BIND: .*this user alone/);
    const other = join(parent, `tp-run-${process.getuid!()}-job-8`);
    symlinkSync(tempDir(), other);
    await expect(rendezvousFolder('job-8', false, 0, parent)).rejects.toThrow(/^TP_BIND: .*this user alone/);
    await expect(rendezvousFolder('job-9', false, 50, parent)).rejects.toThrow(/^TP_BIND: .*ENOENT/);
  });
});
