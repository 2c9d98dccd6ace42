// Runs a row kernel on several threads.
#pragma once
#include "call.h"

void run_on_threads(const Call& call, RowKernel kernel);
