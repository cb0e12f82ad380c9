// The secret that the nodes of a cluster share: made, read, never shown.

import { randomBytes } from 'node:crypto';
import { closeSync, fstatSync, openSync, readFileSync, writeFileSync } from 'node:fs';
import { SECRET_BYTES } from '../comm/curve.js';
import { EXIT, fail } from '../errors.js';
import { log } from '../log.js';
import type { Options } from './options.js';

/** `tp-run keygen FILE`: writes a new key that this user alone can read. TP_FILE_UNWRITABLE when FILE is there. */
export function keygen(file: string): number {
  try {
    writeFileSync(file, `${randomBytes(SECRET_BYTES).toString('hex')}\n`, { mode: 0o600, flag: 'wx' });
  } catch (error) {
    throw fail('TP_FILE_UNWRITABLE', file, (error as Error).message);
  }
  log.info(`${file}: a new key; copy it to every host (mode 0600) and name it by --key-file`);
  return EXIT.ok;
}

/** The key of `--key-file` or TP_RUN_KEY; null with `--insecure`. TP_KEY, TP_KEY_MISSING. */
export function readKey({
  keyFile,
  key,
  insecure,
}: Pick<Options, 'keyFile' | 'key' | 'insecure'>): Buffer | null {
  if (insecure) return null;
  if (keyFile !== null) return parse(readPrivate(keyFile), keyFile);
  if (key !== null) return parse(key, 'TP_RUN_KEY');
  throw fail('TP_KEY_MISSING');
}

function parse(text: string, where: string): Buffer {
  const digits = 2 * SECRET_BYTES;
  if (!new RegExp(`^[0-9a-f]{${digits}}$`).test(text.trim()))
    throw fail('TP_KEY', where, `it is not ${digits} hexadecimal digits`);
  return Buffer.from(text.trim(), 'hex');
}

/** A file of this user that nobody else may read or write. */
function readPrivate(file: string): string {
  let fd: number;
  try {
    fd = openSync(file, 'r');
  } catch (error) {
    throw fail('TP_KEY', file, (error as Error).message);
  }
  try {
    const { mode, uid } = fstatSync(fd);
    if ((mode & 0o077) !== 0)
      throw fail('TP_KEY', file, `others may use it (mode ${(mode & 0o777).toString(8)}); chmod 600 it`);
    if (uid !== process.getuid!()) throw fail('TP_KEY', file, `it belongs to user ${uid}`);
    return readFileSync(fd, 'utf8');
  } finally {
    closeSync(fd);
  }
}
