// Folders that the command line names, made and tried before a run depends on them.

import { closeSync, openSync } from 'node:fs';
import { join } from 'node:path';
import { makeFolder } from '../engine/folder.js';
import { fail } from '../errors.js';

/** Makes `--log-dir` and a first file in it. TP_LOG_DIR. */
export function requireLogDir(dir: string | null): void {
  if (dir === null) return;
  try {
    makeFolder(dir);
    closeSync(openSync(join(dir, 'rank-0.log'), 'a'));
  } catch (error) {
    throw fail('TP_LOG_DIR', dir, (error as Error).message);
  }
}

/** Makes a folder for a result, parents included. TP_FILE_UNWRITABLE. */
export function requireFolder(dir: string): void {
  try {
    makeFolder(dir);
  } catch (error) {
    throw fail('TP_FILE_UNWRITABLE', dir, (error as Error).message);
  }
}
