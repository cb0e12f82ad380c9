// Fills a GPU: allocates all but `leave` bytes of its free memory through the addon, says so, and holds it.
// `node hog.mjs DEVICE LEAVE-BYTES`

import { DEFAULT_CONFIG_FILE, readConfigFile } from '../../dist/model/configfile.js';
import { makePlan } from '../../dist/model/plan.js';
import { native } from '../../dist/native.js';

const [device, leave] = process.argv.slice(2).map(Number);
const { rank, size, model, layers, tensors, steps } = makePlan(
  readConfigFile(DEFAULT_CONFIG_FILE).config,
  0,
  1,
);
const spec = {
  ...{ device: 'cuda', deviceIndex: device, dtype: 'bfloat16', collective: 'local', isa: 'auto', threads: 1 },
  ...{ rank, size, model, layers, steps, trace: false },
  limits: { tokens: 1, rows: 1, sequences: 1, positions: 8, candidates: 1 },
};
const shapes = tensors.map(({ name, shape }) => ({ name, shape }));
const { Engine, cuda } = native();
const small = new Engine({ ...spec, tensors: shapes }); // the context itself takes room: count after it
const free = cuda().devices[device].freeBytes;
const hog = new Engine({
  ...spec,
  tensors: [...shapes, { name: 'hog', shape: [Math.floor((free - leave) / 2)] }],
});
console.log(`full: ${cuda().devices[device].freeBytes}`);
setInterval(() => [small, hog], 1e6);
