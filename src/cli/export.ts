// `tp-run export DIR`: writes a synthetic model as a Hugging Face checkpoint, so that other engines load the same weights.

import { EXIT, fail } from '../errors.js';
import { log } from '../log.js';
import { DEFAULT_CONFIG_FILE, readConfigFile } from '../model/configfile.js';
import { exportCheckpoint } from '../model/export.js';
import { requireFolder } from './folder.js';
import { openModel } from './model.js';
import type { Options } from './options.js';
import { print } from './output.js';

export async function exportModel(options: Options, dir: string): Promise<number> {
  const { source } = openModel(options.model, options.seed);
  if (source.kind === 'checkpoint') {
    throw fail('TP_FLAG_VALUE', '--model', 'a file of configs/', `the checkpoint ${source.dir}`);
  }
  requireFolder(dir);
  const file = readConfigFile(options.model ?? DEFAULT_CONFIG_FILE);
  await exportCheckpoint(dir, file, {
    seed: source.seed,
    onProgress: (bytes, total) =>
      log.progress(`${(bytes / 1e9).toFixed(2)} of ${(total / 1e9).toFixed(2)} GB`),
  });
  log.progress('');
  print(`${dir}\n`);
  return EXIT.ok;
}
