import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { root } from './fixture.js';

/** Tests start the built command: builds dist/ anew when a source is newer. */
export function setup(): void {
  const main = join(root, 'dist/cli/main.js');
  const built = existsSync(main) ? statSync(main).mtimeMs : 0;
  const sources = readdirSync(join(root, 'src'), { recursive: true, encoding: 'utf8' });
  if (sources.every((name) => statSync(join(root, 'src', name)).mtimeMs <= built)) return;
  execFileSync(process.execPath, [join(root, 'scripts/build.mjs'), 'ts'], { stdio: 'inherit' });
}
