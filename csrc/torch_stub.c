/* Deliberately empty: the linker takes only the SONAME, libtorch_cpu.so (see CMakeLists.txt). */
