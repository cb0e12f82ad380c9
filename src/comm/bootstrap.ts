// Where the sockets of one run meet on one host: private folders of ipc endpoints.

import { randomBytes } from 'node:crypto';
import { lstatSync, mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { readdir, rm } from 'node:fs/promises';
import { createConnection } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fail } from '../errors.js';

/** sun_path holds 108 bytes, the last one a zero. */
const LONGEST_PATH = 107;

/** Names one run in messages, logs and environment. */
export function newRunId(): string {
  return randomBytes(8).toString('hex');
}

/** A folder that only this user can enter (0700), for as long as the run lives. */
export class Rendezvous {
  readonly dir: string;

  /** Throws TP_BIND when the temporary folder cannot be written or its path is too long for a socket. */
  constructor(parent = tmpdir()) {
    const longest = join(parent, 'tp-run-XXXXXX', 'r000-r000');
    if (Buffer.byteLength(longest) > LONGEST_PATH) {
      throw fail('TP_BIND', `ipc://${longest}`, `the path is longer than ${LONGEST_PATH} bytes`);
    }
    try {
      this.dir = mkdtempSync(join(parent, 'tp-run-'));
    } catch (error) {
      throw fail('TP_BIND', `ipc://${longest}`, (error as Error).message);
    }
    process.once('exit', this.#remove);
  }

  get control(): string {
    return `ipc://${join(this.dir, 'control')}`;
  }

  /** Safe to call twice; also runs when the process exits. */
  remove(): void {
    process.off('exit', this.#remove);
    this.#remove();
  }

  readonly #remove = (): void => rmSync(this.dir, { recursive: true, force: true });
}

/**
 * The folder where the nodes of one host meet, which all derive from `name`; this user's alone (0700). Node 0 makes it,
 * the others wait for it. TP_BIND when somebody else's is in its place.
 */
export async function rendezvousFolder(
  name: string,
  make: boolean,
  timeoutMs: number,
  parent = tmpdir(),
): Promise<{ dir: string; remove(): void }> {
  const dir = join(parent, `tp-run-${process.getuid!()}-${name}`);
  if (Buffer.byteLength(join(dir, 'nodes')) > LONGEST_PATH)
    throw fail('TP_BIND', `ipc://${dir}`, `the path is longer than ${LONGEST_PATH} bytes`);
  const until = performance.now() + timeoutMs;
  for (;;) {
    try {
      if (make) makePrivate(dir);
      requirePrivate(dir);
      break;
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (make || code !== 'ENOENT' || performance.now() > until)
        throw fail('TP_BIND', `ipc://${dir}`, (error as Error).message);
      await new Promise((done) => setTimeout(done, 20));
    }
  }
  const remove = () => rmSync(dir, { recursive: true, force: true });
  if (make) process.once('exit', remove);
  return {
    dir,
    remove() {
      process.off('exit', remove);
      if (make) remove();
    },
  };
}

function makePrivate(dir: string): void {
  try {
    mkdirSync(dir, { mode: 0o700 });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
  }
}

function requirePrivate(dir: string): void {
  if (!isPrivate(dir)) throw new Error('it is not a folder that this user alone can enter');
}

/**
 * A folder, no link, of this user that nobody else can enter: what stands in it is this user's own word. Throws when
 * there is nothing of that name.
 */
export function isPrivate(dir: string): boolean {
  const stat = lstatSync(dir);
  return stat.isDirectory() && stat.uid === process.getuid!() && (stat.mode & 0o077) === 0;
}

/** A socket that is being bound refuses for some microseconds: nobody listens if it still does so after these ms. */
const STILL_REFUSES_MS = 20;

/**
 * Takes away the folders of this user's runs whose launcher was killed before it could: nobody listens there any more,
 * or `isLeftBehind` knows. Never touches what others can write. Resolves with how many.
 */
export async function removeStale(
  isLeftBehind: (folder: string) => boolean = () => false,
  parent = tmpdir(),
): Promise<number> {
  const names = await readdir(parent).catch(() => []);
  const folders = names.filter((name) => /^tp-run-[\w-]+$/.test(name)).map((name) => join(parent, name));
  const removed = await Promise.all(
    folders.map(async (folder) => {
      try {
        const stale = isPrivate(folder) && (isLeftBehind(folder) || (await isAbandoned(folder)));
        if (stale) await rm(folder, { recursive: true, force: true });
        return stale;
      } catch {
        return false; // another start has been faster
      }
    }),
  );
  return removed.filter(Boolean).length;
}

async function isAbandoned(folder: string): Promise<boolean> {
  const ask = () => Promise.all(['control', 'nodes'].map((name) => refuses(join(folder, name))));
  if (!(await ask()).includes(true)) return false;
  await new Promise((done) => setTimeout(done, STILL_REFUSES_MS));
  return (await ask()).includes(true);
}

/** True when `path` is a socket without a listener; false for everything else, a folder of another user included. */
function refuses(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = createConnection(path)
      .on('connect', () => resolve(false))
      .on('connect', () => socket.destroy())
      .on('error', (error: NodeJS.ErrnoException) => resolve(error.code === 'ECONNREFUSED'));
  });
}

/** The endpoint that `rank` binds for its partner `other`, in the folder of the control endpoint. */
export function pairEndpoint(control: string, rank: number, other: number): string {
  return control.replace(/control$/, `r${rank}-r${other}`);
}
