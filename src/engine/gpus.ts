// What the addon says of this host's GPUs, in the words of the choice of a collective.

import type { GpuFacts } from '../comm/collective.js';
import { native } from '../native.js';

export function gpuFacts(): GpuFacts {
  const { devices, nccl, ncclWhy } = native().cuda();
  return { peers: devices.map(({ peers }) => peers), ncclWhy: nccl === null ? ncclWhy : null };
}
